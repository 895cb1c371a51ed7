//! Commands on a volume that no process has open: `format`, `verify`, `inspect`.

use mainstay::{Store, target_of};

use crate::cli::{Failure, FormatArgs, InspectCommand, OfflineArgs, print};

/// Lays out a volume.
pub(crate) fn format(args: &FormatArgs) -> Result<(), Failure> {
    let builder = Store::builder().wal_bytes(args.wal.0).backend(args.backend.into());
    mainstay_io::block_on(builder.format(target_of(&args.data), args.force))?;
    let document = serde_json::json!({ "formatted": args.data, "wal_bytes": args.wal.0 });
    print(args.json, &document, || format!("formatted {} with a log of {}", args.data.display(), args.wal))
}

/// Checks every checksum.
pub(crate) fn verify(args: &OfflineArgs) -> Result<(), Failure> {
    let _ = args;
    todo!()
}

/// Shows a part.
pub(crate) fn inspect(command: &InspectCommand) -> Result<(), Failure> {
    let _ = command;
    todo!()
}
