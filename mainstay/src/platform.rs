//! The production parts: the network of the operating system. Media and environment come from `mainstay_io`.

use std::sync::Arc;

use mainstay_replication::{TcpTransport, Transport};

use crate::Result;

pub(crate) async fn tcp_transport(listen: &str, advertise: Option<&str>) -> Result<Arc<dyn Transport>> {
    Ok(Arc::new(TcpTransport::bind(listen, advertise).await?))
}
