//! Loop devices, where the machine has them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device over a file, detached when dropped.
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Attaches `file`, made with `bytes`. `None`, with the reason printed, where the machine cannot.
    pub fn attach(file: &Path, bytes: u64) -> Option<Self> {
        let made = std::fs::File::create(file).and_then(|made| made.set_len(bytes));
        made.expect("a file can be made");
        Self::over(file).inspect_err(|reason| eprintln!("no loop device here: {reason}")).ok()
    }

    /// Attaches `file` as it is.
    ///
    /// # Errors
    /// Why the machine cannot.
    pub fn over(file: &Path) -> Result<Self, String> {
        let output = Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file).output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                Ok(Self { path: path.into() })
            }
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
