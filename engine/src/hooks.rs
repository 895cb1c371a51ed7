//! Entry points for the fuzz targets and benches of this workspace.
//!
//! No part of the interface: it changes with the code behind it.

/// Decoders of tables: any bytes in, no panic.
pub mod fuzz {
    /// Opens `bytes` as a table by its own footer and reads it in every way.
    pub fn table(bytes: &[u8]) {
        crate::table::fuzzing::table(bytes);
    }

    /// Takes `bytes` as each part of a table: root, handle, filter, block.
    pub fn table_parts(bytes: &[u8]) {
        crate::table::fuzzing::parts(bytes);
    }
}
