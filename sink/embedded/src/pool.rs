//! The threads that statements run on.
//!
//! Owns the threads and the queue before them; a thread is started when work finds none idle, up to the limit given, and
//! stays. Invariant: when the pool is dropped, all work has ended and all threads are gone. Does not limit the queue
//! (the server counts what it accepts) and does not know what the work is.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

type Work<T> = Box<dyn FnOnce(&T) + Send>;

pub(crate) struct Pool<T: Send + Sync + 'static> {
    shared: Arc<Shared<T>>,
    name: &'static str,
    limit: usize,
}

struct Shared<T> {
    context: T,
    state: Mutex<State<T>>,
    wake: Condvar,
}

struct State<T> {
    queue: VecDeque<Work<T>>,
    threads: Vec<JoinHandle<()>>,
    idle: usize,
    stopping: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Work runs outside the lock, so a panic of it cannot leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(work) = state.queue.pop_front() {
                drop(state);
                // Work that panics drops its reply, which its caller sees; the thread goes on.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&self.context)));
                state = self.lock();
            } else if state.stopping {
                return;
            } else {
                state.idle += 1;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

impl<T: Send + Sync + 'static> Pool<T> {
    pub(crate) fn new(name: &'static str, limit: usize, context: T) -> Pool<T> {
        let state = State { queue: VecDeque::new(), threads: Vec::new(), idle: 0, stopping: false };
        Pool {
            shared: Arc::new(Shared { context, state: Mutex::new(state), wake: Condvar::new() }),
            name,
            limit,
        }
    }

    pub(crate) fn submit(&self, work: Work<T>) {
        let mut state = self.shared.lock();
        state.queue.push_back(work);
        if state.idle < state.queue.len() && state.threads.len() < self.limit {
            let shared = self.shared.clone();
            let name = format!("{}-{}", self.name, state.threads.len());
            match std::thread::Builder::new().name(name).spawn(move || shared.work()) {
                Ok(thread) => state.threads.push(thread),
                // The threads there are will come to it. Without any, the work is dropped, which its caller sees.
                Err(e) if state.threads.is_empty() => {
                    tracing::error!("cannot start a thread: {e}");
                    state.queue.clear();
                }
                Err(e) => tracing::warn!("cannot start another thread: {e}"),
            }
        }
        drop(state);
        self.shared.wake.notify_one();
    }
}

impl<T: Send + Sync + 'static> Drop for Pool<T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        self.shared.wake.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn all_work_is_done_before_the_pool_is_gone() {
        let done = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let pool = Pool::new("t", 4, AtomicUsize::new(0));
        for n in 0..1000 {
            let (done, most) = (done.clone(), most.clone());
            pool.submit(Box::new(move |running| {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::yield_now();
                running.fetch_sub(1, Ordering::SeqCst);
                done.fetch_add(1, Ordering::SeqCst);
                assert_ne!(n % 100, 7, "work may panic");
            }));
        }
        drop(pool);
        assert_eq!(done.load(Ordering::SeqCst), 1000);
        assert!(most.load(Ordering::SeqCst) <= 4);
    }
}
