//! What `twinfs status` shows: the same words on both sites, in JSON and for people.

use std::fmt;

use serde::{Deserialize, Serialize};
use twinfs_core::session::Role;
use twinfs_core::stamp::Timestamp;

/// A session's state at one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What this site is.
    pub role: Role,
    /// `PENDING`, `COPY`, `DUPLEX`, `SUSPENDED`, `RESYNC` or `DIVERGED`.
    pub session_state: String,
    /// Why it is `SUSPENDED` or `DIVERGED`.
    pub reason: Option<String>,
    /// The generation of the primary role.
    pub epoch: u64,
    /// The last consistency group that is visible at the replica.
    pub group: u64,
    /// The instant whose state the replica shows; `None` before the first group.
    pub consistency_time: Option<String>,
    /// Now − consistency time.
    pub delay_seconds: Option<f64>,
    /// Age of the oldest update that is not durable at the replica.
    pub exposure_seconds: f64,
    /// Bytes not durable at the replica.
    pub behind_bytes: u64,
    /// Updates not durable at the replica.
    pub behind_records: u64,
    /// The other site.
    pub peer: PeerStatus,
    /// The volumes of the session.
    pub volumes: Vec<VolumeStatus>,
    /// Bytes on the wire in both directions since this daemon started.
    pub wire_bytes: u64,
    /// Record sets sent (null sets not counted).
    pub sets_sent: u64,
    /// Record sets received (null sets not counted).
    pub sets_received: u64,
    /// Record sets that arrived before their predecessor.
    pub sets_out_of_order: u64,
    /// Write tokens held for updates whose data has not arrived.
    pub tokens_held: u64,
    /// Bytes in use: of the sidefile (primary) or the journal (replica).
    pub store_bytes: u64,
    /// Bytes that may be in use there.
    pub store_bytes_max: u64,
}

/// The other site, as seen from here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct PeerStatus {
    /// Its name, once known.
    pub name: Option<String>,
    /// Its address, once known.
    pub address: Option<String>,
    /// Whether the link is up.
    pub connected: bool,
    /// Round trip time of the link.
    pub rtt_ms: Option<f64>,
    /// Why the link was last lost or refused.
    pub last_error: Option<String>,
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// `PENDING`, `COPY` or `DUPLEX`.
    pub state: String,
    /// Objects that the initial copy has sent.
    pub files_copied: u64,
    /// Objects in all, as far as known.
    pub files_total: u64,
    /// Bytes of data that the initial copy has sent.
    pub bytes_copied: u64,
    /// Bytes in all, as far as known.
    pub bytes_total: u64,
}

/// What a monitoring plugin exits with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// 0
    Ok,
    /// 1
    Warning,
    /// 2
    Critical,
}

impl Status {
    /// Judges the session against a recovery point objective: the greatest delay that is acceptable, in seconds.
    /// Returns one line for the monitoring system.
    #[must_use]
    pub fn check(&self, rpo_seconds: f64) -> (Health, String) {
        let lag = self.delay_seconds.unwrap_or(f64::INFINITY).max(self.exposure_seconds);
        let (health, what) = match (self.role, self.session_state.as_str()) {
            (Role::Promoted, _) => (Health::Warning, "promoted, without a replica".to_owned()),
            (Role::Fenced, _) => (Health::Critical, "another site is the primary".to_owned()),
            (_, "DUPLEX") if !self.peer.connected && lag <= rpo_seconds => {
                (Health::Warning, format!("the link is down; {lag:.2} s behind"))
            }
            (_, "DUPLEX") if lag <= rpo_seconds => (Health::Ok, format!("{lag:.2} s behind")),
            (_, "DUPLEX") if self.delay_seconds.is_none() => {
                (Health::Critical, "nothing was received yet".into())
            }
            (_, "DUPLEX") => (Health::Critical, format!("{lag:.2} s behind, more than {rpo_seconds} s")),
            (_, "COPY" | "RESYNC" | "PENDING") => {
                (Health::Warning, "not all volumes are protected yet".into())
            }
            _ => (Health::Critical, self.reason.clone().unwrap_or_else(|| "not mirroring".into())),
        };
        let word = match health {
            Health::Ok => "OK",
            Health::Warning => "WARNING",
            Health::Critical => "CRITICAL",
        };
        let line = format!("TWINFS {word} - {} {}: {what}", self.role, self.session_state);
        (health, line)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.reason.as_ref().map(|reason| format!("({reason})")).unwrap_or_default();
        writeln!(
            f,
            "{} {}{reason}   epoch {}   group {}",
            self.role, self.session_state, self.epoch, self.group
        )?;
        let delay = self.delay_seconds.map_or("unknown".into(), |delay| format!("{delay:.2} s"));
        let time = self.consistency_time.as_deref().unwrap_or("none yet");
        writeln!(f, "  consistency time  {time}   delay {delay}")?;
        writeln!(
            f,
            "  exposure          {:.2} s   behind {} in {} updates",
            self.exposure_seconds,
            Bytes(self.behind_bytes),
            self.behind_records
        )?;
        let peer = &self.peer;
        let name = peer.name.as_deref().unwrap_or("(none yet)");
        let address = peer.address.as_deref().unwrap_or("-");
        let link = match (peer.connected, peer.rtt_ms) {
            (true, Some(rtt)) => format!("connected, round trip {rtt:.2} ms"),
            (true, None) => "connected".into(),
            (false, _) => "not connected".into(),
        };
        writeln!(f, "  peer              {name} at {address}: {link}")?;
        if let Some(error) = &peer.last_error {
            writeln!(f, "                    last error: {error}")?;
        }
        writeln!(
            f,
            "  link              {} on the wire, sets sent {}, received {} ({} out of order), tokens held {}",
            Bytes(self.wire_bytes),
            self.sets_sent,
            self.sets_received,
            self.sets_out_of_order,
            self.tokens_held
        )?;
        let store = if matches!(self.role, Role::Replica | Role::Promoted) { "journal " } else { "sidefile" };
        writeln!(f, "  {store}          {} of {}", Bytes(self.store_bytes), Bytes(self.store_bytes_max))?;
        for volume in &self.volumes {
            write!(f, "  volume            {}  {}", volume.name, volume.state)?;
            if volume.state == "COPY" {
                write!(
                    f,
                    "  copied {} of {} files, {} of {}",
                    volume.files_copied,
                    volume.files_total,
                    Bytes(volume.bytes_copied),
                    Bytes(volume.bytes_total)
                )?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// A number of bytes in IEC units, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let power = (self.0.ilog2() / 10).min(6);
        let value = self.0 as f64 / 1024f64.powi(power as i32);
        write!(f, "{value:.1} {}", UNITS[power as usize - 1])
    }
}

/// A timestamp for a status, and its age at `now` in seconds.
#[must_use]
pub fn age_seconds(now: Timestamp, then: Timestamp) -> f64 {
    now.ns_since(then) as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Status {
        Status {
            role: Role::Primary,
            session_state: "DUPLEX".into(),
            reason: None,
            epoch: 1,
            group: 17,
            consistency_time: Some(Timestamp(0).to_string()),
            delay_seconds: Some(0.25),
            exposure_seconds: 0.0,
            behind_bytes: 0,
            behind_records: 0,
            peer: PeerStatus { connected: true, ..PeerStatus::default() },
            volumes: vec![],
            wire_bytes: 0,
            sets_sent: 0,
            sets_received: 0,
            sets_out_of_order: 0,
            tokens_held: 0,
            store_bytes: 0,
            store_bytes_max: 0,
        }
    }

    #[test]
    fn only_a_connected_duplex_within_the_objective_is_ok() {
        let health = |status: &Status| status.check(5.0).0;
        assert_eq!(health(&healthy()), Health::Ok);
        let late = Status { delay_seconds: Some(5.1), ..healthy() };
        assert_eq!(health(&late), Health::Critical);
        let exposed = Status { exposure_seconds: 6.0, ..healthy() };
        assert_eq!(health(&exposed), Health::Critical);
        let cut = Status { peer: PeerStatus::default(), ..healthy() };
        assert_eq!(health(&cut), Health::Warning);
        let empty = Status { delay_seconds: None, ..healthy() };
        assert_eq!(health(&empty), Health::Critical);
        for (state, expected) in
            [("COPY", Health::Warning), ("SUSPENDED", Health::Critical), ("DIVERGED", Health::Critical)]
        {
            assert_eq!(health(&Status { session_state: state.into(), ..healthy() }), expected, "{state}");
        }
        assert_eq!(health(&Status { role: Role::Fenced, ..healthy() }), Health::Critical);
    }

    #[test]
    fn bytes_read_well() {
        let text = |bytes| Bytes(bytes).to_string();
        assert_eq!(
            [text(0), text(1023), text(1024), text(3 << 30), text(u64::MAX)].join(" "),
            "0 B 1023 B 1.0 KiB 3.0 GiB 16.0 EiB"
        );
    }
}
