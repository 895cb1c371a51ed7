//! The production parts: media of the operating system, its clock, random source and threads.

use std::sync::Arc;

use mainstay_io::{Environment, Media, MediaOptions, Target};
use mainstay_replication::{TcpTransport, Transport};

use crate::Result;

pub(crate) async fn open_media(target: Target, options: MediaOptions) -> Result<Arc<dyn Media>> {
    let _ = (target, options);
    todo!()
}

pub(crate) fn environment() -> Environment {
    todo!()
}

pub(crate) async fn tcp_transport(listen: &str, advertise: Option<&str>) -> Result<Arc<dyn Transport>> {
    let _ = (listen, advertise, std::mem::size_of::<TcpTransport>());
    todo!()
}
