//! State machines of both ends.
