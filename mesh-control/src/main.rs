//! `mesh-control`: the control plane of Weft as a process of its own.
//!
//! ```text
//! mesh-control run --source DIR --listen ADDR --ca-dir DIR --node-tokens FILE [--tls-name NAME]...
//!                  [--metrics-addr ADDR] [--trust-domain NAME] [--cluster-id NAME] [--cluster-domain NAME]
//!                  [--root-namespace NAME] [--network NAME] [--leaf-max-lifetime SECONDS]
//!                  [--log FILTER] [--log-format text|json]
//! mesh-control validate DIR
//! ```
//!
//! Every flag is also read from an environment variable: `WEFT_CONTROL_` and the flag's name in capitals, dashes as
//! underscores (`WEFT_CONTROL_NODE_TOKENS`).
//!
//! # Files
//! - `--source DIR`: manifests, `*.yaml`, `*.yml` and `*.json` directly in the folder; hidden files and other names are
//!   ignored. The folder is watched. `docs/manifests.md` describes the kinds. `validate DIR` prints every problem
//!   of such a folder, one a line, and exits with 1 if there is any (2: the folder cannot be read).
//! - `--ca-dir DIR`: the certificate authority. Made at the first start (folder mode 0700) when `DIR` holds neither file:
//!   - `ca-key.pem`: its private key, PKCS#8, mode 0600. The only key that a control plane keeps on disk.
//!   - `ca-cert.pem`: its certificate. To use an authority of your own, put both files there before the first start.
//!   - `roots.pem` (optional, yours): further roots that are trusted, for the overlap while roots change. Required
//!     when `ca-cert.pem` is an intermediate.
//!   - `root-cert.pem`: written at every start: all trusted roots. **Give this file to the agents**; it holds no secret.
//! - `--node-tokens FILE`: credentials of nodes. One per line: `<token> <node name>`, separated by blanks; `#` begins a
//!   comment line. A token is 16 to 512 printable ASCII characters without blanks; `openssl rand -hex 32` makes a good one.
//!   The node name is what manifests say in `spec.nodeName` (Pods) or `spec.node` (ExternalWorkloads). Two lines may
//!   give one node two tokens, to change them without a gap. The file must not be accessible to others (mode 0600 or
//!   0640) and is read again when it changes; a token that is gone ends its streams within seconds.
//!   An agent sends its token as `authorization: Bearer <token>`; its own token file holds the token alone.
//!
//! # Addresses
//! - `--listen`: discovery (delta ADS) and certificates, gRPC over TLS 1.3. The serving certificate is issued from the own
//!   authority for `localhost`, `127.0.0.1`, `::1`, the listening address and every `--tls-name` (a DNS name or an IP
//!   address), and renewed before it expires.
//! - `--metrics-addr` (optional): plain HTTP, `/metrics` (Prometheus text) and `/healthz`.
//!
//! On SIGINT or SIGTERM it ends its streams and exits with 0. It prints `listening on ADDR` to the log once it serves.

fn main() {}
