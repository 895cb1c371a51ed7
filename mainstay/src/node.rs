//! A replica of a replicated store, inside this process.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_io::{BoxFuture, Target};
use mainstay_replication::{self as replication, MemberInfo, NodeId, NodeStatus, PeerAddress, SiteLagBound, Transport};
use tokio::runtime::{Handle, Runtime};

use crate::log::{Log, Replicated};
use crate::{Error, ErrorKind, Placed, Result, Store, StoreBuilder, platform, target_of};

/// How a node is started.
#[derive(Clone)]
pub struct NodeOptions {
    name: String,
    target: Target,
    listen: String,
    advertise: Option<String>,
    client_address: String,
    site: String,
    priority: u8,
    witness: bool,
    site_lag_bounds: Vec<SiteLagBound>,
    peers: BTreeMap<String, PeerAddress>,
    heartbeat: Duration,
    election_timeout: Duration,
    entry_cache_bytes: u64,
    storage: StoreBuilder,
    transport: Option<Arc<dyn Transport>>,
}

impl NodeOptions {
    /// A node called `name` with its volume at `path`, a directory or a block device. It listens for peers on a free
    /// port of the loopback interface unless [`NodeOptions::listen`] says otherwise.
    pub fn new(name: impl Into<String>, path: impl AsRef<Path>) -> Self {
        Self {
            name: name.into(),
            target: target_of(path.as_ref()),
            listen: "127.0.0.1:0".into(),
            advertise: None,
            client_address: String::new(),
            site: String::new(),
            priority: 0,
            witness: false,
            site_lag_bounds: Vec::new(),
            peers: BTreeMap::new(),
            heartbeat: Duration::from_millis(100),
            election_timeout: Duration::from_millis(300),
            entry_cache_bytes: 64 << 20,
            storage: StoreBuilder::default(),
            transport: None,
        }
    }

    /// Where to listen for peers, `host:port`.
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.listen = address.into();
        self
    }

    /// Where peers reach this node, if not at the address of [`NodeOptions::listen`].
    pub fn advertise(mut self, address: impl Into<String>) -> Self {
        self.advertise = Some(address.into());
        self
    }

    /// Where clients reach this process, told to others so that they can name the leader. Opaque to the node.
    pub fn client_address(mut self, address: impl Into<String>) -> Self {
        self.client_address = address.into();
        self
    }

    /// The label of the place where this node stands (a zone, a region), for [`crate::Durability::Site`]. Told to the cluster
    /// when the node becomes a member; [`Node::set_member_site`] changes it later.
    pub fn site(mut self, site: impl Into<String>) -> Self {
        self.site = site.into();
        self
    }

    /// Who of those that may lead shall: leadership goes by itself to the voter of the highest priority that is caught up and
    /// whose disk is well. Default 0. Told to the cluster when the node becomes a member; [`Node::set_member_priority`]
    /// changes it later.
    pub fn priority(mut self, priority: u8) -> Self {
        self.priority = priority;
        self
    }

    /// It votes and keeps the log, and holds no data: a witness, for a third place that is to cost little. It answers no reads and
    /// leads only to bring others up to what it has acknowledged. Fewer than half of the voters may be witnesses. Fixed when the node
    /// becomes a member. Default no.
    pub fn witness(mut self, witness: bool) -> Self {
        self.witness = witness;
        self
    }

    /// A site that may lag only so far while this node leads; one bound for each site. Give the same to all members.
    pub fn site_lag_bound(mut self, bound: SiteLagBound) -> Self {
        self.site_lag_bounds.push(bound);
        self
    }

    /// Another process and where it listens for peers; needed before `init` and to find a cluster again. One of the
    /// node's own name is ignored.
    pub fn peer(mut self, name: impl Into<String>, address: impl Into<String>) -> Self {
        self.peers.insert(name.into(), PeerAddress(address.into()));
        self
    }

    /// Interval of heartbeats. Default 100 ms.
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = interval;
        self
    }

    /// Lower bound of the election timeout; the upper is twice as long. Default 300 ms, at least twice the heartbeat.
    pub fn election_timeout(mut self, timeout: Duration) -> Self {
        self.election_timeout = timeout;
        self
    }

    /// Settings of the volume and the store.
    pub fn storage(mut self, storage: StoreBuilder) -> Self {
        self.storage = storage;
        self
    }

    /// A network of one's own in the place of TCP.
    pub fn transport(mut self, transport: Arc<dyn Transport>) -> Self {
        self.transport = Some(transport);
        self
    }
}

/// A node: one replica. Cloning shares it; [`Node::store`] gives the same interface as a store alone.
///
/// A new node waits: it takes part once [`Node::init`] gave birth to a cluster with it, or a cluster has added it.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Replicated>,
    address: PeerAddress,
}

impl Node {
    /// Opens the volume (laid out if there is nothing yet) and starts the node on the tokio runtime of the caller.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`]; `Unavailable` when the address cannot be listened on; `Invalid` outside tokio.
    pub async fn start(options: NodeOptions) -> Result<Self> {
        let handle = Handle::try_current()
            .map_err(|_| Error::new(ErrorKind::Invalid, "start runs inside tokio: use start_blocking elsewhere"))?;
        Self::start_on(options, handle, None).await
    }

    /// As [`Node::start`] on a runtime of its own, for programs without tokio.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_blocking(options: NodeOptions) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("mainstay-node")
            .enable_all()
            .build()
            .map_err(|e| Error::new(ErrorKind::Unavailable, format!("no threads for the runtime: {e}")))?;
        let handle = runtime.handle().clone();
        let entered = handle.clone();
        let _entered = entered.enter();
        mainstay_io::block_on(Self::start_on(options, handle, Some(runtime)))
    }

    async fn start_on(options: NodeOptions, handle: Handle, runtime: Option<Runtime>) -> Result<Self> {
        let transport = match options.transport {
            Some(transport) => transport,
            None => platform::tcp_transport(&options.listen, options.advertise.as_deref()).await?,
        };
        let address = transport.local_address();
        let environment = options.storage.environment_or_system();
        let media = options.storage.media(&options.target)?;
        let (engine, found) = options.storage.open_engine(media, environment.clone(), true).await?;
        let mut peers = options.peers;
        peers.insert(options.name.clone(), address.clone());
        let node_options = replication::NodeOptions {
            name: options.name,
            client_address: options.client_address,
            site: options.site,
            priority: options.priority,
            witness: options.witness,
            site_lag_bounds: options.site_lag_bounds,
            peers,
            heartbeat: options.heartbeat,
            election_timeout: options.election_timeout,
            group: options.storage.group_settings(),
            entry_cache_bytes: options.entry_cache_bytes,
            environment,
        };
        let node = replication::Node::start(engine.clone(), found, node_options, transport).await?;
        let runtime = Mutex::new(runtime);
        Ok(Self {
            inner: Arc::new(Replicated { node: Arc::new(node), engine, handle, runtime, _first: None }),
            address,
        })
    }

    /// The replicated store: the interface of a store alone, with [`Store::with_durability`] and
    /// [`Store::with_read_level`] to choose what a write and a read promise.
    pub fn store(&self) -> Store {
        Store::over(Log::Replicated(self.inner.clone()))
    }

    /// The store in a group of that name, which is born over the voters of now if it is not there: a log with a leader of its own beside
    /// the first, for writes that need no order among each other. Batches, snapshots, checkpoints and clones are of one group each.
    ///
    /// # Errors
    /// `Invalid`: the name has no or more than 64 bytes, or there are 128 groups already. `Unavailable` (also of a witness), `Indeterminate`: the same call again finds what was made.
    pub fn create_group(&self, name: &str) -> BoxFuture<Result<Store>> {
        let name = name.to_owned();
        self.bind(|inner| async move {
            let node = inner.node.create_group(&name).await?;
            Ok(group_store(&inner, node))
        })
    }

    /// The store in a group that was made.
    ///
    /// # Errors
    /// `NotFound`: nobody made it. `Unavailable`: no leader answers.
    pub fn open_group(&self, name: &str) -> BoxFuture<Result<Store>> {
        let name = name.to_owned();
        self.bind(|inner| async move {
            let node = inner.node.open_group(&name).await?;
            Ok(group_store(&inner, node))
        })
    }

    /// Names of the groups beside the first, as far as this node has applied that one.
    pub fn group_names(&self) -> Vec<String> {
        self.inner.node.group_names()
    }

    /// The keyspace of that name whose ranges of keys lie in different groups; made if it is absent, as one range of the first group. It
    /// has nothing in common with a keyspace of [`Node::store`] of the same name.
    ///
    /// # Errors
    /// `Invalid`: a name of 0 or more than 200 bytes. `Unavailable`, `Indeterminate`: the same call again finds what was made.
    pub fn placed(&self, name: &str) -> BoxFuture<Result<Placed>> {
        let (name, log) = (name.to_owned(), self.log());
        self.bind(|inner| async move { Ok(Placed::new(log, inner.node.placed(&name).await?)) })
    }

    /// The placed keyspace of that name, if it was made. Cancel safe.
    ///
    /// # Errors
    /// `NotFound`: nobody made it. `Invalid`: a name of 0 or more than 200 bytes. `Unavailable`: no leader answers.
    pub fn open_placed(&self, name: &str) -> BoxFuture<Result<Placed>> {
        let (name, log) = (name.to_owned(), self.log());
        self.bind(|inner| async move { Ok(Placed::new(log, inner.node.open_placed(&name).await?)) })
    }

    /// Names of the placed keyspaces that were made, in order. Cancel safe.
    ///
    /// # Errors
    /// `Unavailable`: no leader answers.
    pub fn placed_names(&self) -> BoxFuture<Result<Vec<String>>> {
        self.bind(|inner| async move { inner.node.placed_names().await })
    }

    /// The replica underneath, for a server: commands, barriers, forwarding.
    pub fn replica(&self) -> &Arc<replication::Node> {
        &self.inner.node
    }

    /// The volume underneath, for its status.
    pub fn engine(&self) -> &mainstay_engine::Engine {
        &self.inner.engine
    }

    /// Where peers reach this node.
    pub fn peer_address(&self) -> &PeerAddress {
        &self.address
    }

    fn log(&self) -> Log {
        Log::Replicated(self.inner.clone())
    }

    fn bind<T, F>(&self, call: impl FnOnce(Arc<Replicated>) -> F) -> BoxFuture<Result<T>>
    where
        T: Send + 'static,
        F: Future<Output = replication::Result<T>> + Send + 'static,
    {
        let future = call(self.inner.clone());
        self.log().bind(async move { Ok(future.await?) })
    }

    /// Gives birth to a cluster over `members`, named as in [`NodeOptions::peer`], this one included. Idempotent: the same call again
    /// finds the cluster made and returns its id.
    ///
    /// # Errors
    /// `Invalid` (a member has data or another cluster, an unknown name), `Unavailable` (a member does not answer).
    pub fn init<S: Into<String>>(&self, members: impl IntoIterator<Item = S>) -> BoxFuture<Result<[u8; 16]>> {
        let members: Vec<String> = members.into_iter().map(Into::into).collect();
        self.bind(|inner| async move { inner.node.init(&members).await })
    }

    /// Adds the process of that name as a learner under a new id, and makes it a voter once it has caught up if `voter`.
    pub fn add_member(&self, name: &str, address: PeerAddress, voter: bool) -> BoxFuture<Result<MemberInfo>> {
        let name = name.to_owned();
        self.bind(|inner| async move { inner.node.add_member(&name, address, voter).await })
    }

    /// Makes a learner a voter.
    pub fn promote_member(&self, id: NodeId) -> BoxFuture<Result<()>> {
        self.bind(|inner| async move { inner.node.promote_member(id).await })
    }

    /// Changes the label of the place where a member stands.
    pub fn set_member_site(&self, id: NodeId, site: &str) -> BoxFuture<Result<()>> {
        let site = site.to_owned();
        self.bind(move |inner| async move { inner.node.set_member_site(id, &site).await })
    }

    /// Changes the priority of a member; see [`NodeOptions::priority`].
    pub fn set_member_priority(&self, id: NodeId, priority: u8) -> BoxFuture<Result<()>> {
        self.bind(move |inner| async move { inner.node.set_member_priority(id, priority).await })
    }

    /// Raises the version of the cluster ([`NodeStatus::cluster_version`]) to the newest that this build reads, once every member is of a
    /// build that reads it, and returns it. Until then each member may go back to the build before, with its volume; from then on none
    /// may. Nothing changes where the cluster has that version. May be called again after any error.
    ///
    /// # Errors
    /// `Unsupported`: a member reads less, which the message names, or the leader does. `Unavailable`: a member does not answer, or there
    /// is no leader. `Indeterminate`: it may have been raised.
    pub fn finalize(&self) -> BoxFuture<Result<u16>> {
        self.bind(|inner| async move { inner.node.finalize().await })
    }

    /// Removes a member. Its volume never takes part again; wiped, it can be added anew.
    pub fn remove_member(&self, id: NodeId) -> BoxFuture<Result<()>> {
        self.bind(|inner| async move { inner.node.remove_member(id).await })
    }

    /// Hands leadership to `to`, or to the voter with the highest priority of those that are caught up, and returns the new leader. It
    /// leads for a minute at least before a voter with a higher priority does.
    pub fn transfer_leader(&self, to: Option<NodeId>) -> BoxFuture<Result<NodeId>> {
        self.bind(|inner| async move { inner.node.transfer_leader(to).await })
    }

    /// Resolves at each change of leader, role or membership. Cancel safe.
    pub fn changed(&self) -> BoxFuture<()> {
        let inner = self.inner.clone();
        self.log().bind(async move { inner.node.changed().await })
    }

    /// Counts and states.
    pub fn status(&self) -> NodeStatus {
        self.inner.node.status()
    }

    /// True while this node leads.
    pub fn is_leader(&self) -> bool {
        self.status().role == "leader"
    }

    /// Hands leadership over if it leads, stops taking part and closes the volume.
    pub fn close(&self) -> BoxFuture<Result<()>> {
        self.bind(|inner| async move { inner.node.close().await })
    }

    /// Waits for a future on this thread: for the calls above where there is no executor.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.log().wait(future)
    }
}

fn group_store(first: &Arc<Replicated>, node: replication::Node) -> Store {
    let (engine, handle) = (first.engine.clone(), first.handle.clone());
    let group =
        Replicated { node: Arc::new(node), engine, handle, runtime: Mutex::new(None), _first: Some(first.clone()) };
    Store::over(Log::Replicated(Arc::new(group)))
}
