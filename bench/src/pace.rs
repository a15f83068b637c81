//! The open loop's clock: who is to send when, whatever the broker does.
//!
//! Batch `i` is due at `start + i / rate` and belongs to connection `i mod connections`. A thread wakes the runtime
//! every [`QUANTUM`] because tokio's own timers are a millisecond coarse; a task then hands out what is due. The
//! time handed out is the *intended* one, so waiting for a slow broker counts as latency.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Bounds how late a request may leave because of the clock itself.
const QUANTUM: Duration = Duration::from_micros(200);

/// What one connection has been told to send, by intended time.
#[derive(Default)]
pub struct Due {
    pub queue: RefCell<VecDeque<Instant>>,
    waker: Cell<Option<Waker>>,
}

impl Due {
    pub fn wake_with(&self, waker: &Waker) {
        self.waker.set(Some(waker.clone()));
    }

    fn push(&self, at: Instant) {
        self.queue.borrow_mut().push_back(at);
        if let Some(w) = self.waker.take() {
            w.wake();
        }
    }
}

/// Hands out `rate` requests a second from `start` to `end`; returns how many were due in all.
pub async fn run(dues: Vec<Rc<Due>>, rate: f64, start: Instant, end: Instant) -> u64 {
    let tick = Arc::new(Notify::new());
    let stop = Arc::new(AtomicBool::new(false));
    let clock = std::thread::spawn({
        let (tick, stop) = (tick.clone(), stop.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(QUANTUM);
                tick.notify_one();
            }
        }
    });
    let mut next = 0u64;
    loop {
        let now = Instant::now();
        loop {
            let at = start + Duration::from_secs_f64(next as f64 / rate);
            if at > now || at >= end {
                break;
            }
            dues[(next % dues.len() as u64) as usize].push(at);
            next += 1;
        }
        if now >= end {
            break;
        }
        tick.notified().await;
    }
    stop.store(true, Ordering::Relaxed);
    // It ends within one quantum; a panic there would already have stopped the ticks.
    let _ = clock.join();
    next
}
