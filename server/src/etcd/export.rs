//! The stream of `Maintenance.Snapshot`.

use mainstay_replication::NodeStatus;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::model::View;
use super::model::store::Reader;
use crate::proto::etcdserverpb as pb;

pub(super) fn stream<R: Reader + 'static>(
    status: NodeStatus,
    view: View<R>,
    header: Option<pb::ResponseHeader>,
) -> ReceiverStream<Result<pb::SnapshotResponse, Status>> {
    let _ = (status, view, header);
    let (answers, outbound) = mpsc::channel(4);
    let _ = answers.try_send(Err(Status::unimplemented("mainstay: snapshot")));
    ReceiverStream::new(outbound)
}
