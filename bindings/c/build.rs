//! Generates include/mainstay.h from the exported functions.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=cbindgen.toml");
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    let root = Path::new(&root);
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml is in the repository");
    match cbindgen::generate_with_config(root, config) {
        // Written only when it differs, so that a build of an unchanged tree leaves it unchanged.
        Ok(bindings) => {
            bindings.write_to_file(root.join("include/mainstay.h"));
        }
        // The compiler is about to say what is wrong with the source, and says it better.
        Err(error) => println!("cargo::warning=the header was not generated: {error}"),
    }
}
