//! The door to libchdb: the only unsafe code of this crate.
//!
//! Owns the loaded library, the connections to the engine in it and the threads that use them. One process has one
//! engine on one data directory; an `Engine` keeps one connection open for as long as it lives (the anchor), since
//! closing the last one shuts the engine down. Every statement gets a connection of its own (0.2 ms), so settings, the
//! current database and temporary tables of one statement cannot reach another; a `Session` keeps its connection.
//! Invariants: one connection is used by one thread at a time (the library forbids more), which Rust's ownership of
//! `Connection` gives us; statements run on the pool's threads, which end before the engine is closed; the library is
//! never unloaded.
//! Does not know HTTP, does not limit how many statements wait (the server does), never installs signal handlers.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use libloading::Library;

use crate::pool::Pool;
use crate::run::Session;
use crate::statement::{Answer, EngineError, Statement, code};

/// Statements that run at once; each takes a thread and a connection. ClickHouse's own default is 100; this engine
/// serves a laptop or a test.
pub const MAX_RUNNING: usize = 64;

/// Data handed to the engine in one call; it copies what it gets, so this bounds the copy.
const APPEND_BYTES: usize = 4 << 20;

// The C interface. Handles are opaque pointers; a `chdb_connection *` points to the connection handle.
type Handle = *mut c_void;
type ConnectFn = unsafe extern "C" fn(c_int, *mut *mut c_char) -> *mut Handle;
type CloseFn = unsafe extern "C" fn(*mut Handle);
type QueryFn = unsafe extern "C" fn(
    Handle,
    *const c_char,
    usize,
    *const c_char,
    usize,
    *const *const c_char,
    *const usize,
    *const *const c_char,
    *const usize,
    usize,
) -> Handle;
type AppendFn = unsafe extern "C" fn(Handle, *const c_void, usize) -> c_int;
type HandleFn = unsafe extern "C" fn(Handle);
type DoneFn = unsafe extern "C" fn(Handle) -> Handle;
type TextFn = unsafe extern "C" fn(Handle) -> *const c_char;
type BufferFn = unsafe extern "C" fn(Handle) -> *mut c_char;
type LengthFn = unsafe extern "C" fn(Handle) -> usize;
type CountFn = unsafe extern "C" fn(Handle) -> u64;
type ClassifyFn =
    unsafe extern "C" fn(Handle, *const c_char, usize, *const c_char, usize, *mut Analysis) -> c_int;
type SignalsFn = unsafe extern "C" fn(c_int);

/// `chdb_query_analysis_v1`.
#[repr(C)]
struct Analysis {
    struct_size: u32,
    statement_count: u32,
    flags: u32,
    query_class: u32,
}

/// The symbols that are used. The library is never unloaded: it has threads of its own, and state in every thread that
/// called it, whose code must stay.
struct Api {
    connect: ConnectFn,
    close: CloseFn,
    query: QueryFn,
    insert: QueryFn,
    append: AppendFn,
    done: DoneFn,
    cancel: HandleFn,
    insert_error: TextFn,
    destroy_insert: HandleFn,
    result_error: TextFn,
    result_buffer: BufferFn,
    result_length: LengthFn,
    rows_read: CountFn,
    bytes_read: CountFn,
    rows_written: CountFn,
    bytes_written: CountFn,
    destroy_result: HandleFn,
    classify: Option<ClassifyFn>,
}

impl Api {
    fn load(lib: &Path) -> Result<Api, EngineError> {
        let cannot = |what: String| EngineError::new(code::CANNOT_OPEN_FILE, what);
        // SAFETY: loading runs the library's initialisers. It is the file that the operator named or fetched, and the
        // library is documented to be loadable into any process.
        let library = unsafe { Library::new(lib) }
            .map_err(|e| cannot(format!("cannot load the ClickHouse engine {}: {e}", lib.display())))?;
        macro_rules! symbol {
            ($name:literal, $type:ty) => {
                // SAFETY: the type is the one that chdb.h declares for this name, and the library stays loaded.
                *unsafe { library.get::<$type>(concat!($name, "\0").as_bytes()) }.map_err(|e| {
                    cannot(format!(
                        "{} lacks {}: it is not libchdb, or older than 26.7 ({e}); run sink/embedded/fetch-engine.sh",
                        lib.display(),
                        $name
                    ))
                })?
            };
        }
        let signals = symbol!("chdb_set_signal_handlers_enabled", SignalsFn);
        let api = Api {
            connect: symbol!("chdb_connect", ConnectFn),
            close: symbol!("chdb_close_conn", CloseFn),
            query: symbol!("chdb_query_with_params_n", QueryFn),
            insert: symbol!("chdb_stream_insert_with_params_n", QueryFn),
            append: symbol!("chdb_stream_append", AppendFn),
            done: symbol!("chdb_stream_done", DoneFn),
            cancel: symbol!("chdb_stream_cancel_insert", HandleFn),
            insert_error: symbol!("chdb_stream_insert_error", TextFn),
            destroy_insert: symbol!("chdb_destroy_insert_stream", HandleFn),
            result_error: symbol!("chdb_result_error", TextFn),
            result_buffer: symbol!("chdb_result_buffer", BufferFn),
            result_length: symbol!("chdb_result_length", LengthFn),
            rows_read: symbol!("chdb_result_rows_read", CountFn),
            bytes_read: symbol!("chdb_result_bytes_read", CountFn),
            rows_written: symbol!("chdb_result_rows_written", CountFn),
            bytes_written: symbol!("chdb_result_bytes_written", CountFn),
            destroy_result: symbol!("chdb_destroy_query_result", HandleFn),
            // SAFETY: as above; older libraries do not have it.
            classify: unsafe { library.get::<ClassifyFn>(b"chdb_classify_query_n\0") }.ok().map(|s| *s),
        };
        std::mem::forget(library);
        // SAFETY: takes a flag; called before the first connection, as the header asks.
        unsafe { signals(0) };
        Ok(api)
    }

    /// Copies the text of an error; `None` where there is none.
    fn text(pointer: *const c_char) -> Option<String> {
        if pointer.is_null() {
            return None;
        }
        // SAFETY: the library returns NUL-terminated text that lives as long as the handle it was asked of, and every
        // caller here still holds that handle.
        let text = unsafe { CStr::from_ptr(pointer) }.to_string_lossy();
        if text.is_empty() { None } else { Some(text.into_owned()) }
    }

    /// Takes what a result handle holds and destroys it.
    fn take(&self, result: Handle) -> Result<Answer, EngineError> {
        if result.is_null() {
            return Err(EngineError::new(code::LOGICAL_ERROR, "the engine gave no result"));
        }
        // SAFETY: `result` is a live result handle that only this function holds; the buffer belongs to it and has
        // the length that the library says; it is copied before the handle is destroyed, once.
        unsafe {
            let error = Api::text((self.result_error)(result));
            let answer = match error {
                Some(text) => Err(EngineError::parse(&text)),
                None => {
                    let buffer = (self.result_buffer)(result);
                    let length = (self.result_length)(result);
                    let data = if buffer.is_null() || length == 0 {
                        Vec::new()
                    } else {
                        std::slice::from_raw_parts(buffer.cast::<u8>(), length).to_vec()
                    };
                    Ok(Answer {
                        data,
                        rows_read: (self.rows_read)(result),
                        bytes_read: (self.bytes_read)(result),
                        rows_written: (self.rows_written)(result),
                        bytes_written: (self.bytes_written)(result),
                    })
                }
            };
            (self.destroy_result)(result);
            answer
        }
    }
}

/// Names and values of parameters in the shape that the library wants.
struct Bound {
    names: Vec<*const c_char>,
    name_lens: Vec<usize>,
    values: Vec<*const c_char>,
    value_lens: Vec<usize>,
}

impl Bound {
    /// The pointers are into `params`, which the caller keeps borrowed during the call.
    fn new(params: &[(String, String)]) -> Bound {
        Bound {
            names: params.iter().map(|(n, _)| n.as_ptr().cast()).collect(),
            name_lens: params.iter().map(|(n, _)| n.len()).collect(),
            values: params.iter().map(|(_, v)| v.as_ptr().cast()).collect(),
            value_lens: params.iter().map(|(_, v)| v.len()).collect(),
        }
    }
}

/// One connection. Not shared: methods take `&mut self`.
pub(crate) struct Connection {
    api: Arc<Api>,
    raw: *mut Handle,
}

// SAFETY: the library lets any thread use a connection as long as no two do at once; `&mut self` gives that.
unsafe impl Send for Connection {}

impl Connection {
    fn open(api: &Arc<Api>, data_dir: &Path) -> Option<Connection> {
        let mut path = b"--path=".to_vec();
        path.extend_from_slice(data_dir.as_os_str().as_bytes());
        // chdb reads a bare expression as a SELECT of it and allows introspection; a server does neither.
        let args = [
            CString::new("flumen-clickhouse").ok()?,
            CString::new(path).ok()?,
            CString::from(c"--implicit_select=0"),
            CString::from(c"--allow_introspection_functions=0"),
        ];
        let mut argv: Vec<*mut c_char> = args.iter().map(|a| a.as_ptr().cast_mut()).collect();
        // SAFETY: argc and argv describe NUL-terminated strings that outlive the call; the library copies them.
        let raw = unsafe { (api.connect)(argv.len() as c_int, argv.as_mut_ptr()) };
        if raw.is_null() { None } else { Some(Connection { api: api.clone(), raw }) }
    }

    fn handle(&self) -> Handle {
        // SAFETY: `raw` came from connect, is not null and points to the handle until it is closed, which only
        // drop does.
        unsafe { *self.raw }
    }

    pub(crate) fn query(
        &mut self,
        sql: &[u8],
        format: &str,
        params: &[(String, String)],
    ) -> Result<Answer, EngineError> {
        let bound = Bound::new(params);
        // SAFETY: all pointers are into slices that outlive the call, with their own lengths.
        let result = unsafe {
            (self.api.query)(
                self.handle(),
                sql.as_ptr().cast(),
                sql.len(),
                format.as_ptr().cast(),
                format.len(),
                bound.names.as_ptr(),
                bound.name_lens.as_ptr(),
                bound.values.as_ptr(),
                bound.value_lens.as_ptr(),
                params.len(),
            )
        };
        self.api.take(result)
    }

    pub(crate) fn text(&mut self, sql: &str) -> Result<String, EngineError> {
        let answer = self.query(sql.as_bytes(), "TSVRaw", &[])?;
        Ok(String::from_utf8_lossy(&answer.data).trim_end().to_owned())
    }

    /// Runs an INSERT whose data is given in pieces.
    pub(crate) fn insert(
        &mut self,
        head: &[u8],
        format: &str,
        params: &[(String, String)],
        pieces: [&[u8]; 3],
    ) -> Result<Answer, EngineError> {
        let api = self.api.clone();
        let bound = Bound::new(params);
        // SAFETY: as in `query`.
        let stream = unsafe {
            (api.insert)(
                self.handle(),
                head.as_ptr().cast(),
                head.len(),
                format.as_ptr().cast(),
                format.len(),
                bound.names.as_ptr(),
                bound.name_lens.as_ptr(),
                bound.values.as_ptr(),
                bound.value_lens.as_ptr(),
                params.len(),
            )
        };
        if stream.is_null() {
            return Err(EngineError::new(code::LOGICAL_ERROR, "the engine gave no insert stream"));
        }
        // SAFETY: `stream` is live until destroy_insert below, which runs once on every path; it is finished or
        // cancelled before; appended bytes are copied by the library within the call.
        unsafe {
            let outcome = match Api::text((api.insert_error)(stream)) {
                Some(text) => Err(EngineError::parse(&text)),
                None => {
                    let mut chunks = pieces.iter().flat_map(|piece| piece.chunks(APPEND_BYTES));
                    let refused = chunks.any(|c| (api.append)(stream, c.as_ptr().cast(), c.len()) != 0);
                    if refused {
                        let text = Api::text((api.insert_error)(stream))
                            .unwrap_or_else(|| "the engine refused the data".to_owned());
                        (api.cancel)(stream);
                        Err(EngineError::parse(&text))
                    } else {
                        api.take((api.done)(stream))
                    }
                }
            };
            (api.destroy_insert)(stream);
            outcome
        }
    }

    /// How many statements the text holds, and their class in chdb.h (1 and 2 change data or definitions); `None`
    /// where the library cannot say or cannot parse it.
    pub(crate) fn classify(&mut self, sql: &[u8]) -> Option<(u32, u32)> {
        let classify = self.api.classify?;
        let mut analysis = Analysis {
            struct_size: size_of::<Analysis>() as u32,
            statement_count: 0,
            flags: 0,
            query_class: 0,
        };
        // SAFETY: the text outlives the call and `analysis` says its own size.
        let state = unsafe {
            classify(self.handle(), sql.as_ptr().cast(), sql.len(), std::ptr::null(), 0, &raw mut analysis)
        };
        (state == 0 && analysis.statement_count > 0)
            .then_some((analysis.statement_count, analysis.query_class))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: `raw` is live and closed exactly once, here; nothing runs on it, since we own it.
        unsafe { (self.api.close)(self.raw) };
    }
}

/// What the engine says about itself.
#[derive(Debug, Clone)]
pub struct About {
    pub version: String,
    pub timezone: String,
    pub host: String,
}

/// Gives connections to work that runs on the engine's threads.
pub struct Door {
    api: Arc<Api>,
    data_dir: PathBuf,
}

impl Door {
    /// Runs one statement with all that applies to it, on a connection of its own.
    pub fn run(&self, statement: &Statement) -> Result<Answer, EngineError> {
        self.connect()?.run(statement)
    }

    /// Opens a session: its settings, current database and temporary tables last as long as it does.
    pub fn session(&self) -> Result<Session, EngineError> {
        Ok(Session { connection: self.connect()? })
    }

    fn connect(&self) -> Result<Connection, EngineError> {
        Connection::open(&self.api, &self.data_dir).ok_or_else(|| {
            EngineError::new(code::ABORTED, "the engine gave no connection: it is shutting down. (ABORTED)")
        })
    }
}

/// The engine on one data directory. Thread-safe.
pub struct Engine {
    // Fields drop in this order: first the threads end, then the last connection closes the engine.
    pool: Pool<Door>,
    // Behind a mutex only to be Sync; never used for statements.
    _anchor: Mutex<Connection>,
    about: About,
    data_dir: PathBuf,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("data_dir", &self.data_dir).field("about", &self.about).finish()
    }
}

impl Engine {
    /// Loads the library and opens the data directory, which it creates.
    pub fn open(lib: &Path, data_dir: &Path) -> Result<Engine, EngineError> {
        let dir = data_dir.display();
        std::fs::create_dir_all(data_dir)
            .map_err(|e| EngineError::new(code::CANNOT_OPEN_FILE, format!("cannot create {dir}: {e}")))?;
        let data_dir = data_dir
            .canonicalize()
            .map_err(|e| EngineError::new(code::CANNOT_OPEN_FILE, format!("cannot open {dir}: {e}")))?;
        let api = Arc::new(Api::load(lib)?);
        // The library gives no reason; these are the ones that occur.
        let mut anchor = Connection::open(&api, &data_dir).ok_or_else(|| {
            EngineError::new(
                code::CANNOT_OPEN_FILE,
                format!(
                    "the ClickHouse engine cannot open {}: another process uses it (stop that one, or choose another \
                     directory), this process has the engine open on another directory, or the directory cannot be \
                     written",
                    data_dir.display()
                ),
            )
        })?;
        let about = About {
            version: anchor.text("SELECT version()")?,
            timezone: anchor.text("SELECT timezone()")?,
            host: anchor.text("SELECT hostName()")?,
        };
        let pool = Pool::new("clickhouse", MAX_RUNNING, Door { api, data_dir: data_dir.clone() });
        Ok(Engine { pool, _anchor: Mutex::new(anchor), about, data_dir })
    }

    pub fn about(&self) -> &About {
        &self.about
    }

    /// Runs one statement on a connection of its own; blocks.
    pub fn query(&self, sql: &str, format: &str, body: Option<&[u8]>) -> Result<Vec<u8>, EngineError> {
        let statement = Statement {
            sql: sql.as_bytes().to_vec(),
            format: format.to_owned(),
            body: body.map(bytes::Bytes::copy_from_slice),
            ..Statement::default()
        };
        Ok(self.run(statement)?.data)
    }

    /// Runs one statement with all that applies to it, on a connection of its own; blocks.
    pub fn run(&self, statement: Statement) -> Result<Answer, EngineError> {
        let (reply, outcome) = std::sync::mpsc::sync_channel(1);
        self.submit(move |door| {
            // The other side waits below; it cannot be gone.
            let _ = reply.send(door.run(&statement));
        });
        outcome.recv().unwrap_or_else(|_| {
            Err(EngineError::new(code::ABORTED, "the statement did not end: its thread failed. (ABORTED)"))
        })
    }

    /// Runs work on one of the engine's threads; returns at once. The work waits while `MAX_RUNNING` others run.
    pub fn submit(&self, work: impl FnOnce(&Door) + Send + 'static) {
        self.pool.submit(Box::new(work));
    }
}

/// Ends the process with status 0 and without its exit handlers, which would tear the engine down under what runs.
pub(crate) fn leave_process() -> ! {
    unsafe extern "C" {
        fn _exit(status: c_int) -> !;
    }
    // SAFETY: POSIX `_exit` takes any status and touches no memory of ours.
    unsafe { _exit(0) }
}
