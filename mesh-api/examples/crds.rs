//! Writes the CustomResourceDefinitions of Weft's kinds into a folder, one file each; `cargo xtask crds` runs it.

use std::{env, error::Error, fs, path::PathBuf};

/// Says where the files come from.
const HEADER: &str =
    "# Written by `cargo xtask crds` from the types in mesh-api; change those instead.\n";

fn main() -> Result<(), Box<dyn Error>> {
    let folder: PathBuf = env::args_os()
        .nth(1)
        .ok_or("name the folder to write to")?
        .into();
    for definition in mesh_api::manifest::definitions() {
        let name = definition["metadata"]["name"]
            .as_str()
            .ok_or("a definition without a name")?;
        let path = folder.join(format!("{name}.yaml"));
        fs::write(
            &path,
            format!("{HEADER}{}", serde_norway::to_string(&definition)?),
        )?;
        println!("{}", path.display());
    }
    Ok(())
}
