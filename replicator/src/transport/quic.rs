//! transport/quic
