//! What takes a while.

use super::answer::{ApiError, ErrorBody, Query, key};
use crate::host::{Host, HostError};
use crate::operations::{Operation, Stage, finished};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use serde::Deserialize;
use std::time::Duration;
use tokio::sync::watch;
use utoipa::IntoParams;

/// The longest that an answer is waited for, in seconds.
const LONGEST_WAIT: u64 = 600;
/// How long a guest has to power off, if nobody says, in seconds.
const PATIENCE: f64 = 10.0;

/// How long is waited.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wait {
    /// Seconds to wait for the operation's end before the answer comes, 600 at most.
    #[serde(default)]
    wait: u64,
    /// Seconds that the guest has to power off before its process is told to end, instead of 10.
    #[serde(default)]
    timeout: Option<f64>,
}

impl Wait {
    fn patience(&self) -> Result<Duration, ApiError> {
        let seconds = self.timeout.unwrap_or(PATIENCE);
        match Duration::try_from_secs_f64(seconds) {
            Ok(patience) if patience <= Duration::from_secs(86400) => Ok(patience),
            _ => Err(ApiError::invalid(format!(
                "{seconds} is no time; give 0 to 86400 seconds"
            ))),
        }
    }

    async fn answer(&self, operation: watch::Receiver<Operation>) -> (StatusCode, Json<Operation>) {
        let most = Duration::from_secs(self.wait.min(LONGEST_WAIT));
        let ended = tokio::time::timeout(most, finished(operation.clone())).await;
        let state = ended.unwrap_or_else(|_late| operation.borrow().clone());
        let status = match state.stage {
            Stage::Running => StatusCode::ACCEPTED,
            _ => StatusCode::OK,
        };
        (status, Json(state))
    }
}

/// Start a VM. The operation ends when its guest runs.
#[utoipa::path(post, path = "/v1/vms/{vm}/start", params(("vm" = String, Path), Wait, ("idempotency-key" = Option<String>, Header)),
    responses((status = 202, body = Operation), (status = 200, body = Operation, description = "It has ended"), (status = 404, body = ErrorBody)))]
pub(crate) async fn start(
    State(host): State<Host>,
    Path(vm): Path<String>,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    Ok(wait.answer(host.start(&vm, key(&headers)?)?).await)
}

/// Stop a VM: its guest is asked to power off, then its process is told to end, then killed.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", params(("vm" = String, Path), Wait, ("idempotency-key" = Option<String>, Header)),
    responses((status = 202, body = Operation), (status = 200, body = Operation, description = "It has ended"), (status = 404, body = ErrorBody)))]
pub(crate) async fn stop(
    State(host): State<Host>,
    Path(vm): Path<String>,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    Ok(wait.answer(host.stop(&vm, wait.patience()?, key(&headers)?)?).await)
}

/// Stop a VM and start it.
#[utoipa::path(post, path = "/v1/vms/{vm}/restart", params(("vm" = String, Path), Wait, ("idempotency-key" = Option<String>, Header)),
    responses((status = 202, body = Operation), (status = 200, body = Operation, description = "It has ended"), (status = 404, body = ErrorBody)))]
pub(crate) async fn restart(
    State(host): State<Host>,
    Path(vm): Path<String>,
    Query(wait): Query<Wait>,
    headers: HeaderMap,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    Ok(wait.answer(host.restart(&vm, wait.patience()?, key(&headers)?)?).await)
}

/// List what is under way, and what has ended lately.
#[utoipa::path(get, path = "/v1/operations", responses((status = 200, body = Vec<Operation>)))]
pub(crate) async fn list(State(host): State<Host>) -> Json<Vec<Operation>> {
    Json(host.operations().list())
}

/// Say how far an operation is.
#[utoipa::path(get, path = "/v1/operations/{operation}", params(("operation" = String, Path), Wait),
    responses((status = 202, body = Operation), (status = 200, body = Operation, description = "It has ended"), (status = 404, body = ErrorBody)))]
pub(crate) async fn look(
    State(host): State<Host>,
    Path(id): Path<String>,
    Query(wait): Query<Wait>,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let operation = host.operations().find(&id).ok_or(HostError::NoOperation(id))?;
    Ok(wait.answer(operation).await)
}

/// Cancel an operation. A VM that was to start is killed; one that was to stop keeps running if it does not stop by itself.
#[utoipa::path(delete, path = "/v1/operations/{operation}", params(("operation" = String, Path)),
    responses((status = 200, body = Operation), (status = 404, body = ErrorBody)))]
pub(crate) async fn cancel(State(host): State<Host>, Path(id): Path<String>) -> Result<Json<Operation>, ApiError> {
    let operation = host.operations().cancel(&id).ok_or(HostError::NoOperation(id))?;
    Ok(Json(finished(operation).await))
}
