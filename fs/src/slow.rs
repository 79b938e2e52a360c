//! A few threads for calls that wait for a disk, so that the threads that serve the kernel go on.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use twinfs_core::limits;

type Call = Box<dyn FnOnce() + Send>;

/// The threads, and the bounded queue to them. They end when it is dropped.
#[derive(Debug)]
pub struct Slow {
    calls: SyncSender<Call>,
}

impl Slow {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system's, if it has no more threads.
    pub fn start() -> std::io::Result<Self> {
        let (calls, queue) = sync_channel::<Call>(limits::SLOW_CALLS_MAX);
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..limits::SLOW_THREADS {
            let queue = queue.clone();
            std::thread::Builder::new().name(format!("twinfs-slow-{number}")).spawn(move || serve(&queue))?;
        }
        Ok(Self { calls })
    }

    /// Has `call` done by one of the threads, or by this one if the queue is full.
    pub fn run(&self, call: impl FnOnce() + Send + 'static) {
        match self.calls.try_send(Box::new(call)) {
            Ok(()) => {}
            Err(TrySendError::Full(call) | TrySendError::Disconnected(call)) => call(),
        }
    }
}

fn serve(queue: &Mutex<Receiver<Call>>) {
    loop {
        // The lock is held while waiting for a call, never while one is done.
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(call) => call(),
            Err(_) => return,
        }
    }
}
