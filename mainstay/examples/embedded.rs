//! A store inside one process: keyspaces, a batch, a snapshot, a checkpoint and a clone.
//!
//! Run: `cargo run --example embedded -- DIR` (a temporary directory without DIR).

use mainstay::{Batch, Result, Store};

fn main() -> Result<()> {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let path = std::env::args_os().nth(1).map_or_else(|| scratch.path().join("store"), Into::into);
    let store = Store::open(&path)?;

    let stars = store.keyspace("stars")?;
    let by_magnitude = store.keyspace("by_magnitude")?;
    let mut batch = Batch::new();
    for (name, magnitude) in [("sirius", "-1.46"), ("vega", "0.03"), ("polaris", "1.98"), ("procyon", "0.34")] {
        batch.insert(&stars, name, magnitude).insert(&by_magnitude, format!("{magnitude}/{name}"), "");
    }
    let commit = store.commit(batch)?;
    println!("four stars in two keyspaces at index {}", commit.index());

    for entry in stars.prefix("p").rev() {
        let entry = entry?;
        println!("{} {}", text(&entry.key), text(&entry.value));
    }

    let before = store.snapshot()?;
    stars.remove("vega")?;
    println!("vega now: {:?}, in the snapshot: {:?}", stars.get("vega")?, before.get(&stars, "vega")?);

    if !store.checkpoints().iter().any(|checkpoint| checkpoint.name == "catalogue") {
        store.checkpoint("catalogue")?;
        store.create_clone("what-if", "catalogue")?;
    }
    let what_if = store.open_clone("what-if")?.keyspace("stars")?;
    what_if.insert("betelgeuse", "a supernova")?;
    println!("betelgeuse in the clone: {:?}, here: {:?}", what_if.get("betelgeuse")?, stars.get("betelgeuse")?);

    store.close()
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}
