//! A network between two sockets of this machine: slow, far and lossy as a test wants it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// How the network behaves, in each direction.
#[derive(Clone, Copy)]
pub(super) struct Network {
    pub(super) delay: Duration,
    pub(super) bytes_per_second: u64,
    /// Longest wait in the queue of the bottleneck; what would wait longer is dropped.
    pub(super) queue: Duration,
    /// One datagram in so many is lost; 0 for none.
    pub(super) loss_one_in: u64,
    pub(super) seed: u64,
}

/// Passes datagrams between one client and one server.
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Relay {
    pub(super) async fn to(server: SocketAddr, network: Network) -> Self {
        let front = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let address = front.local_addr().unwrap();
        let client = Arc::new(OnceCell::new());
        let mut tasks = JoinSet::new();
        let knows = client.clone();
        let (lane, out) = mpsc::unbounded_channel();
        tasks.spawn(carry_in(front.clone(), lane, network, move |from| {
            let _ = knows.set(from);
        }));
        let to_server = back.clone();
        tasks.spawn(carry_out(out, move |bytes| {
            let _ = to_server.try_send_to(&bytes, server);
        }));
        let (lane, out) = mpsc::unbounded_channel();
        tasks.spawn(carry_in(back, lane, Network { seed: network.seed ^ 1, ..network }, |_| {}));
        tasks.spawn(carry_out(out, move |bytes| {
            if let Some(client) = client.get() {
                let _ = front.try_send_to(&bytes, *client);
            }
        }));
        Self { address, _tasks: tasks }
    }
}

type Lane = mpsc::UnboundedSender<(Instant, Vec<u8>)>;

/// Takes datagrams and decides when, and whether, each leaves. The lane is bounded by `queue` and `delay`.
async fn carry_in(socket: Arc<UdpSocket>, lane: Lane, network: Network, seen: impl Fn(SocketAddr)) {
    let mut random = network.seed | 1;
    let mut free = Instant::now();
    let mut buffer = vec![0; 65_536];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        if length == 0 {
            // Somebody only looks whether the port is open.
            continue;
        }
        seen(from);
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let lost = network.loss_one_in > 0 && (random >> 33).is_multiple_of(network.loss_one_in);
        let now = Instant::now();
        free = free.max(now);
        if lost || free - now > network.queue {
            continue;
        }
        free += Duration::from_nanos(length as u64 * 1_000_000_000 / network.bytes_per_second);
        if lane.send((free + network.delay, buffer[..length].to_vec())).is_err() {
            return;
        }
    }
}

async fn carry_out(mut lane: mpsc::UnboundedReceiver<(Instant, Vec<u8>)>, send: impl Fn(Vec<u8>)) {
    while let Some((at, bytes)) = lane.recv().await {
        if at > Instant::now() {
            sleep_until(at).await;
        }
        send(bytes);
    }
}
