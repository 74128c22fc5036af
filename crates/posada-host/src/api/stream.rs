//! Answers that go on, and connections through to a VM.

use super::answer::{ApiError, ErrorBody, Query};
use crate::events::missed;
use crate::host::Host;
use crate::logs::{self, Tail};
use crate::{control, process};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use utoipa::{IntoParams, ToSchema};

/// Parts of an answer that wait for a slow client.
const WAITING: usize = 16;
/// Linux gives process times in hundredths of a second.
const TICKS: f64 = 100.0;

/// A body that grows.
struct Parts(mpsc::Receiver<Bytes>);

impl Stream for Parts {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|part| part.map(Ok))
    }
}

fn growing(kind: &'static str) -> (mpsc::Sender<Bytes>, Response) {
    let (sender, receiver) = mpsc::channel(WAITING);
    let body = Body::from_stream(Parts(receiver));
    (sender, ([(header::CONTENT_TYPE, kind)], body).into_response())
}

/// What of a log.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct LogQuery {
    /// Go on as it grows, until the VM has ended.
    #[serde(default)]
    follow: bool,
    /// Only so many of its last lines.
    #[serde(default)]
    tail: Option<usize>,
    /// What the VM's process had to say instead of what its console printed.
    #[serde(default)]
    process: bool,
}

/// Read what a VM's console printed. The last MiB is kept, and up to one more before it.
#[utoipa::path(get, path = "/v1/vms/{vm}/logs", params(("vm" = String, Path), LogQuery),
    responses((status = 200, content_type = "application/octet-stream"), (status = 404, body = ErrorBody)))]
pub(crate) async fn logs(
    State(host): State<Host>,
    Path(vm): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, ApiError> {
    let vm = host.find(&vm)?;
    let path = match query.process {
        true => vm.folder().process_log(),
        false => vm.folder().console_log(),
    };
    let tail = Tail {
        lines: query.tail,
        follow: query.follow,
    };
    let (sender, response) = growing("application/octet-stream");
    tokio::spawn(async move {
        if let Err(error) = logs::send(&vm, path, tail, &sender).await {
            tracing::warn!(id = vm.id(), %error, "a log cannot be read");
        }
    });
    Ok(response)
}

/// From where on.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventQuery {
    /// Tell those behind this number first, as far as they are remembered.
    #[serde(default)]
    since: Option<u64>,
    /// End after those instead of waiting for more.
    #[serde(default)]
    past: bool,
}

/// Watch what happens: a line of JSON for each event.
#[utoipa::path(get, path = "/v1/events", params(EventQuery),
    responses((status = 200, body = crate::events::Event, content_type = "application/x-ndjson")))]
pub(crate) async fn events(State(host): State<Host>, Query(query): Query<EventQuery>) -> Response {
    let since = query.since.or(query.past.then_some(0));
    let (past, mut later) = host.events().watch(since);
    let (sender, response) = growing("application/x-ndjson");
    tokio::spawn(async move {
        for event in past {
            if sender.send(line(&event)).await.is_err() {
                return;
            }
        }
        if query.past {
            return;
        }
        loop {
            let event = tokio::select! {
                event = later.recv() => event,
                () = sender.closed() => return,
            };
            let event = match event {
                Ok(event) => event,
                Err(RecvError::Lagged(count)) => missed(count),
                Err(RecvError::Closed) => return,
            };
            if sender.send(line(&event)).await.is_err() {
                return;
            }
        }
    });
    response
}

fn line(value: &impl Serialize) -> Bytes {
    // Of plain data it cannot fail.
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

/// What a VM uses of its host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Statistics {
    /// The VM's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// vCPUs.
    pub cpus: u32,
    /// Seconds that its process's threads have run since its start.
    pub cpu_seconds: f64,
    /// Guest memory in bytes.
    pub memory: u64,
    /// What of it the host has really given.
    pub touched: u64,
    /// Memory that its process has now, in bytes.
    pub resident: u64,
}

/// Say what a VM uses of its host.
#[utoipa::path(get, path = "/v1/vms/{vm}/stats", params(("vm" = String, Path)),
    responses((status = 200, body = Statistics), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn stats(State(host): State<Host>, Path(vm): Path<String>) -> Result<Json<Statistics>, ApiError> {
    let view = host.find(&vm)?.view();
    let (Some(pid), Some(sockets)) = (view.pid, &view.sockets) else {
        return Err(not_running(&view.name));
    };
    let status = control::status(sockets).await;
    let status = status.map_err(|error| {
        let message = format!("cannot look at {}: {error}", view.name);
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", message)
    })?;
    Ok(Json(Statistics {
        id: view.id,
        name: view.name,
        cpus: status.cpus,
        cpu_seconds: process::cpu_ticks(pid) as f64 / TICKS,
        memory: status.memory,
        touched: status.touched,
        resident: process::resident(pid),
    }))
}

fn not_running(name: &str) -> ApiError {
    let message = format!("{name} is not running; posada start {name} starts it");
    ApiError::new(StatusCode::CONFLICT, "conflict", message)
}

/// Connect to a VM's console (`Upgrade: posada-console`): what it prints from now on, and what is typed.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", params(("vm" = String, Path)),
    responses((status = 101), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn console(
    State(host): State<Host>,
    Path(vm): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    through(&host, &vm, "console", "posada-console", request).await
}

/// Connect to a VM's vsock (`Upgrade: posada-vsock`): what follows is `CONNECT PORT`, a newline and so on, as at the socket.
#[utoipa::path(get, path = "/v1/vms/{vm}/vsock", params(("vm" = String, Path)),
    responses((status = 101), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn vsock(
    State(host): State<Host>,
    Path(vm): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    through(&host, &vm, "vsock", "posada-vsock", request).await
}

/// Makes of a request a connection to one of a VM's sockets. The daemon passes bytes on and looks at none.
async fn through(
    host: &Host,
    vm: &str,
    socket: &str,
    protocol: &'static str,
    request: Request,
) -> Result<Response, ApiError> {
    let view = host.find(vm)?.view();
    let asked = request.headers().get(header::UPGRADE);
    if asked.is_none_or(|asked| asked != protocol) {
        return Err(ApiError::invalid(format!("this address needs Upgrade: {protocol}")));
    }
    let Some(sockets) = &view.sockets else {
        return Err(not_running(&view.name));
    };
    let inside = UnixStream::connect(sockets.join(socket)).await;
    let mut inside = inside.map_err(|error| {
        let message = format!("cannot reach the {socket} of {}: {error}", view.name);
        ApiError::new(StatusCode::CONFLICT, "conflict", message)
    })?;
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(outside) => {
                let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(outside), &mut inside).await;
            }
            Err(error) => tracing::debug!(%error, "a client wanted a connection and went"),
        }
    });
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static(protocol));
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    Ok(response)
}
