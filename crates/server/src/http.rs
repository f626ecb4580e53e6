//! HTTP: routes, limits, keys, and the end of the server.

mod app;
mod generate;
mod guard;
mod plain;
mod sessions;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::http::HeaderValue;
use axum::middleware;
use axum::routing::{delete, get, post};
use tokio::net::TcpListener;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::engine::{self, Limits, Served};
use crate::metrics::Metrics;
use crate::notify::notify;
use crate::sessions::{Kind, Sessions};
pub(crate) use app::{App, Ready};

/// How the server meets the world.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Where it listens.
    pub address: SocketAddr,
    /// What clients must send as a bearer key.
    pub api_key: Option<String>,
    /// Origins whose pages may use the server; none: no other page may.
    pub cors_origins: Vec<String>,
    /// Bytes of a request.
    pub max_body: usize,
    /// New tokens of a chat answer that names no limit.
    pub default_max_tokens: usize,
    /// How long answers may go on after the signal to end.
    pub grace: Duration,
    /// The model's name to clients.
    pub model_name: String,
    /// Where prefixes are stored.
    pub session_dir: Option<PathBuf>,
}

/// The server can't run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// An origin is not one.
    #[error("CORS origin `{0}`: not an origin such as https://example.org")]
    Origin(String),
    /// The system refuses.
    #[error("cannot {operation}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Figures can't be made.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The model can't be loaded.
    #[error("{0}")]
    Load(Box<dyn std::error::Error + Send + Sync>),
    /// The engine broke down.
    #[error("the engine ended on an error of its own; see the log above")]
    Engine,
}

fn io(operation: &'static str) -> impl Fn(std::io::Error) -> ServeError {
    move |source| ServeError::Io { operation, source }
}

/// What `load` gives.
pub type Loaded = Result<(Served, kvquant_model::ChatTemplate, Limits), Box<dyn std::error::Error + Send + Sync>>;

/// Serves until `end` comes, then lets answers finish for a while; a second `end` cuts them short. Listens at once, and
/// answers that it is not ready while `load` runs.
///
/// # Errors
/// The address can't be had, the model can't be loaded, or the engine broke down.
pub async fn serve<F: Future<Output = ()> + Send + 'static>(
    options: HttpOptions,
    load: impl FnOnce() -> Loaded + Send + 'static,
    mut end: impl FnMut() -> F + Send + 'static,
    ready: impl FnOnce(SocketAddr) + Send,
) -> Result<(), ServeError> {
    let metrics = Arc::new(Metrics::new()?);
    let address = options.address;
    let listener = TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })?;
    let address = listener.local_addr().map_err(io("ask for the address"))?;
    let grace = options.grace;
    let app = Arc::new(App::new(options, metrics.clone()));
    let routes = router(app.clone())?;

    let (ended, mut stop_listening) = tokio::sync::watch::channel(false);
    let listening = tokio::spawn(async move {
        let stop = async move {
            // The other end lives as long as the server.
            let _ = stop_listening.wait_for(|ended| *ended).await;
        };
        axum::serve(listener, routes).with_graceful_shutdown(stop).await
    });

    let signal = end();
    tokio::pin!(signal);
    let loading = tokio::task::spawn_blocking(load);
    let (served, template, limits) = tokio::select! {
        loaded = loading => match loaded {
            Ok(Ok(all)) => all,
            Ok(Err(e)) => return Err(ServeError::Load(e)),
            Err(_) => return Err(ServeError::Engine),
        },
        () = &mut signal => return Ok(()),
    };
    let (model, tokenizer) = (served.model.clone(), served.tokenizer.clone());
    let kind = Kind { identity: served.identity.clone(), root: served.root(), prefill_chunk: limits.prefill_chunk };
    let sessions = match &app.options.session_dir {
        Some(dir) => Some(Arc::new(Sessions::open(dir, kind, &served.empty).map_err(io("use the session folder"))?)),
        None => None,
    };
    let (engine, thread) =
        engine::start(served, limits.clone(), metrics, sessions.clone()).map_err(io("start the engine"))?;
    app.warm_up(&engine, &tokenizer).await?;
    app.set_ready(Ready { engine: engine.clone(), model, tokenizer, template, limits, sessions });
    if let Err(e) = notify("READY=1") {
        tracing::warn!(error = %e, "systemd could not be told");
    }
    ready(address);

    // The engine ends before the signal only by an error of its own.
    let broken = tokio::task::spawn_blocking(move || thread.join().is_err());
    tokio::pin!(broken);
    let broke = tokio::select! {
        () = &mut signal => false,
        _ = &mut broken => true,
    };
    tracing::info!(grace_seconds = grace.as_secs(), "shutting down; answers may finish");
    if let Err(e) = notify("STOPPING=1") {
        tracing::warn!(error = %e, "systemd could not be told");
    }
    app.draining.store(true, Ordering::Relaxed);
    ended.send_replace(true);
    let mut listening = listening;
    let again = end();
    tokio::pin!(again);
    let finished = tokio::select! {
        done = &mut listening => Some(done),
        () = tokio::time::sleep(grace) => None,
        () = &mut again => None,
    };
    engine.stop();
    if finished.is_none() {
        // Streams get their last event.
        let _ = tokio::time::timeout(Duration::from_secs(5), &mut listening).await;
        listening.abort();
    }
    if broke {
        return Err(ServeError::Engine);
    }
    match broken.await {
        Ok(false) => Ok(()),
        _ => Err(ServeError::Engine),
    }
}

/// [`serve`] on a runtime of its own, until the process is asked to end (SIGINT, SIGTERM).
///
/// # Errors
/// As [`serve`].
pub fn run(
    options: HttpOptions,
    load: impl FnOnce() -> Loaded + Send + 'static,
    ready: impl FnOnce(SocketAddr) + Send,
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(io("start the runtime"))?;
    let done = runtime.block_on(async {
        let signals = Signals::new().map_err(io("watch for signals"))?;
        serve(options, load, move || signals.clone().next(), ready).await
    });
    // A model that is still being loaded is not waited for.
    runtime.shutdown_background();
    done
}

/// The signals that ask a process to end.
#[derive(Clone)]
struct Signals(Arc<tokio::sync::Notify>);

impl Signals {
    fn new() -> std::io::Result<Self> {
        let notify = Arc::new(tokio::sync::Notify::new());
        let tell = notify.clone();
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            tokio::spawn(async move {
                loop {
                    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
                    tell.notify_one();
                }
            });
        }
        #[cfg(not(unix))]
        tokio::spawn(async move {
            while tokio::signal::ctrl_c().await.is_ok() {
                tell.notify_one();
            }
        });
        Ok(Signals(notify))
    }

    async fn next(self) {
        self.0.notified().await;
    }
}

/// All routes.
fn router(app: Arc<App>) -> Result<Router, ServeError> {
    let mut cors = Vec::new();
    for origin in &app.options.cors_origins {
        let plausible = origin.starts_with("http://") || origin.starts_with("https://");
        let value = HeaderValue::from_str(origin).ok().filter(|_| plausible && !origin.ends_with('/'));
        cors.push(value.ok_or_else(|| ServeError::Origin(origin.clone()))?);
    }
    let mut routes = Router::new()
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completion))
        .route("/v1/tokenize", post(plain::tokenize))
        .route("/v1/models", get(plain::models))
        .route("/v1/models/{model}", get(plain::model))
        .route("/v1/sessions", get(sessions::list).post(sessions::save))
        .route("/v1/sessions/{name}", delete(sessions::remove))
        .route("/stats", get(plain::stats))
        .route("/metrics", get(plain::metrics))
        .route("/health", get(plain::health))
        .route("/openapi.json", get(plain::openapi))
        .route("/", get(plain::page))
        .route("/page.js", get(plain::script))
        .route("/page.css", get(plain::style))
        .fallback(plain::not_found)
        .method_not_allowed_fallback(plain::wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), guard::guard));
    if !cors.is_empty() {
        routes = routes.layer(
            CorsLayer::new()
                .allow_origin(AllowOrigin::list(cors))
                .allow_methods([axum::http::Method::GET, axum::http::Method::POST, axum::http::Method::DELETE])
                .allow_headers([axum::http::header::CONTENT_TYPE, axum::http::header::AUTHORIZATION]),
        );
    }
    Ok(routes.with_state(app))
}
