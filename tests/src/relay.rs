//! A UDP relay on loopback between two sites: bandwidth, delay, loss, and a link that can be cut.
//!
//! Both directions share the settings, each has a line of its own. What does not fit the line's queue is dropped, as a
//! router would.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ops::Rng;

/// Bytes that may wait for the line in one direction.
const QUEUE_BYTES_MAX: u64 = 512 << 10;
/// How long a receiving thread waits before it looks whether it should end.
const POLL: Duration = Duration::from_millis(100);

/// What the link is like.
#[derive(Debug, Clone, Copy, Default)]
pub struct Link {
    /// Nothing passes.
    pub cut: bool,
    /// Bytes per second in each direction; `None` is unlimited.
    pub bandwidth: Option<u64>,
    /// One-way delay.
    pub delay: Duration,
    /// Packets lost, in a thousand.
    pub loss_permille: u64,
}

/// A running relay; dropped, it ends.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    port: u16,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    front: UdpSocket,
    target: SocketAddr,
    stop: AtomicBool,
    link: Mutex<Link>,
    queue: Mutex<Queue>,
    wake: Condvar,
    forwarded: [AtomicU64; 2],
}

#[derive(Debug, Default)]
struct Queue {
    packets: BinaryHeap<Reverse<Packet>>,
    number: u64,
    /// When the line is free again, and the bytes that wait for it, by direction.
    lines: [Line; 2],
}

#[derive(Debug, Default)]
struct Line {
    free_at: Option<Instant>,
    waiting: u64,
}

#[derive(Debug)]
struct Packet {
    due: Instant,
    number: u64,
    direction: usize,
    bytes: Vec<u8>,
    out: Arc<UdpSocket>,
    to: SocketAddr,
}

impl PartialEq for Packet {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Packet {}
impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Packet {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

const TO_TARGET: usize = 0;
const TO_CLIENT: usize = 1;

impl Relay {
    /// Relays from a port of its own to `port` on loopback.
    ///
    /// # Panics
    /// If there is no free port.
    #[must_use]
    pub fn start(port: u16) -> Self {
        let front = socket();
        let own_port = front.local_addr().expect("a bound socket has an address").port();
        let shared = Arc::new(Shared {
            front,
            target: SocketAddr::from(([127, 0, 0, 1], port)),
            stop: AtomicBool::new(false),
            link: Mutex::default(),
            queue: Mutex::default(),
            wake: Condvar::new(),
            forwarded: Default::default(),
        });
        let (receiving, sending) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = vec![
            std::thread::spawn(move || receive_from_clients(&receiving)),
            std::thread::spawn(move || send_when_due(&sending)),
        ];
        Self { shared, port: own_port, threads }
    }

    /// Where clients send to.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Changes what the link is like. What is under way already stays so, but for a cut, which drops it.
    pub fn set(&self, link: Link) {
        *lock(&self.shared.link) = link;
        if link.cut {
            *lock(&self.shared.queue) = Queue::default();
        }
        self.shared.wake.notify_all();
    }

    /// Cuts the link or mends it, whatever else it is like.
    pub fn cut(&self, cut: bool) {
        let link = Link { cut, ..*lock(&self.shared.link) };
        self.set(link);
    }

    /// Bytes of packets that went to the target so far.
    #[must_use]
    pub fn bytes_to_target(&self) -> u64 {
        self.shared.forwarded[TO_TARGET].load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free UDP port");
    socket.set_read_timeout(Some(POLL)).expect("a timeout can be set");
    // The link drops packets when we say so, not when this machine is busy.
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20).expect("root sets any size");
    socket
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn offer(&self, direction: usize, bytes: &[u8], out: &Arc<UdpSocket>, to: SocketAddr, random: &mut Rng) {
        let link = *lock(&self.link);
        if link.cut || random.below(1000) < link.loss_permille {
            return;
        }
        let mut queue = lock(&self.queue);
        let line = &mut queue.lines[direction];
        let now = Instant::now();
        let mut due = now;
        if let Some(bandwidth) = link.bandwidth {
            if line.waiting + bytes.len() as u64 > QUEUE_BYTES_MAX {
                return;
            }
            let start = line.free_at.unwrap_or(now).max(now);
            due = start + Duration::from_nanos(bytes.len() as u64 * 1_000_000_000 / bandwidth);
            line.free_at = Some(due);
        }
        line.waiting += bytes.len() as u64;
        due += link.delay;
        queue.number += 1;
        let number = queue.number;
        let packet = Packet { due, number, direction, bytes: bytes.to_vec(), out: Arc::clone(out), to };
        queue.packets.push(Reverse(packet));
        drop(queue);
        self.wake.notify_all();
    }
}

fn receive_from_clients(shared: &Arc<Shared>) {
    let mut clients: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut threads = Vec::new();
    let mut buffer = vec![0; 65_536];
    let mut random = Rng(1);
    while !shared.stopped() {
        let Ok((len, from)) = shared.front.recv_from(&mut buffer) else { continue };
        let out = clients.entry(from).or_insert_with(|| {
            let socket = Arc::new(socket());
            let (shared, back) = (Arc::clone(shared), Arc::clone(&socket));
            threads.push(std::thread::spawn(move || receive_from_target(&shared, &back, from)));
            socket
        });
        let out = Arc::clone(out);
        shared.offer(TO_TARGET, &buffer[..len], &out, shared.target, &mut random);
    }
    for thread in threads {
        drop(thread.join());
    }
}

fn receive_from_target(shared: &Arc<Shared>, socket: &Arc<UdpSocket>, client: SocketAddr) {
    let front = Arc::new(shared.front.try_clone().expect("a socket can be duplicated"));
    let mut buffer = vec![0; 65_536];
    let mut random = Rng(2);
    while !shared.stopped() {
        if let Ok((len, _)) = socket.recv_from(&mut buffer) {
            shared.offer(TO_CLIENT, &buffer[..len], &front, client, &mut random);
        }
    }
}

fn send_when_due(shared: &Shared) {
    let mut queue = lock(&shared.queue);
    while !shared.stopped() {
        let now = Instant::now();
        let wait = match queue.packets.peek() {
            Some(Reverse(packet)) if packet.due <= now => {
                let Reverse(packet) = queue.packets.pop().expect("there is one");
                let len = packet.bytes.len() as u64;
                let line = &mut queue.lines[packet.direction];
                line.waiting = line.waiting.saturating_sub(len);
                drop(queue);
                // The target may not listen now: UDP does not mind.
                if packet.out.send_to(&packet.bytes, packet.to).is_ok() {
                    shared.forwarded[packet.direction].fetch_add(len, Ordering::Relaxed);
                }
                queue = lock(&shared.queue);
                continue;
            }
            Some(Reverse(packet)) => packet.due - now,
            None => POLL,
        };
        queue = shared.wake.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner).0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UdpSocket, UdpSocket, Relay) {
        let target = UdpSocket::bind("127.0.0.1:0").unwrap();
        target.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let relay = Relay::start(target.local_addr().unwrap().port());
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        client.connect(relay.address()).unwrap();
        (client, target, relay)
    }

    #[test]
    fn packets_pass_both_ways_unless_the_link_is_cut() {
        let (client, target, relay) = pair();
        let mut buffer = [0; 100];
        client.send(b"ping").unwrap();
        let (len, from) = target.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"ping");
        target.send_to(b"pong", from).unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap(), 4);
        relay.cut(true);
        client.send(b"lost").unwrap();
        assert!(target.recv_from(&mut buffer).is_err());
        relay.cut(false);
        client.send(b"again").unwrap();
        assert_eq!(target.recv_from(&mut buffer).unwrap().0, 5);
        assert_eq!(relay.bytes_to_target(), 9);
    }

    #[test]
    fn a_slow_link_drops_what_does_not_fit_and_delivers_the_rest() {
        let (client, target, relay) = pair();
        relay.set(Link { bandwidth: Some(1 << 20), loss_permille: 100, ..Link::default() });
        let start = Instant::now();
        for _ in 0..300 {
            client.send(&[7; 1000]).unwrap();
        }
        let mut buffer = [0; 2000];
        let mut received = 0u64;
        while received < 200 && target.recv_from(&mut buffer).is_ok() {
            received += 1;
        }
        assert_eq!(received, 200, "about nine in ten arrive");
        // A lower bound only: a busy machine may be late, never early.
        assert!(start.elapsed() >= Duration::from_millis(180), "{:?}", start.elapsed());
    }
}
