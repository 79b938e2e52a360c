//! How QUIC is set up, and why.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use super::congestion::NoiseTolerant;
use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime, TransportConfig, VarInt};
use rustix::net::sockopt;
use twinfs_core::limits;

/// Which end of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Opens the connection and its control stream.
    Primary,
    /// Accepts both.
    Replica,
}

pub(super) fn transport(end: End) -> Arc<TransportConfig> {
    let idle = VarInt::from_u32(limits::LINK_IDLE_MS_MAX as u32);
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(idle.into()))
        .keep_alive_interval(Some(Duration::from_millis(limits::LINK_KEEP_ALIVE_MS)))
        // The one control stream comes from the primary; each side has one stream of tokens and many of record sets.
        .max_concurrent_bidi_streams(VarInt::from_u32(u32::from(end == End::Replica)))
        .max_concurrent_uni_streams(VarInt::from_u32(limits::SET_STREAMS_MAX + 1))
        .stream_receive_window(VarInt::from_u32(limits::STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(limits::LINK_WINDOW_BYTES))
        .send_window(u64::from(limits::LINK_WINDOW_BYTES))
        // Priorities say all. Without fairness a record set once begun would go out before any token.
        .send_fairness(true)
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(NoiseTolerant));
    Arc::new(config)
}

/// An endpoint with large kernel buffers: at 1 Gbit/s, the usual 208 KiB hold less than 2 ms.
pub(super) fn endpoint(address: SocketAddr, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    let socket = UdpSocket::bind(address)?;
    // Privileged callers may pass the system's maximum, others get what it allows; neither is worth failing for.
    let bytes = limits::SOCKET_BUFFER_BYTES;
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, bytes));
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, bytes)
        .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, bytes));
    Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime))
}
