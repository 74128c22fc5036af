//! Requests that are wrong, and answers that say so.

use crate::host::HostError;
use crate::name::NameError;
use crate::store::StoreError;
use crate::vm::VmError;
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use utoipa::ToSchema;

/// The longest key of a request that may be sent again, in bytes.
const LONGEST_KEY: usize = 128;

/// Why a request was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// For programs: `not-found`, `invalid`, `conflict`, `no-space`, `failed`.
    pub code: String,
    /// For people: what failed, why, and what to do.
    pub message: String,
}

/// An error with its status.
#[derive(Debug)]
pub(crate) struct ApiError(StatusCode, ErrorBody);

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let (code, message) = (code.into(), message.into());
        Self(status, ErrorBody { code, message })
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

fn no_space(error: &StoreError) -> bool {
    let full = |error: &io::Error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    matches!(error, StoreError::Host { source, .. } if full(source))
}

impl From<HostError> for ApiError {
    fn from(error: HostError) -> Self {
        let (status, code) = match &error {
            HostError::Name(NameError::Impossible(_)) | HostError::Bad(_) => (StatusCode::BAD_REQUEST, "invalid"),
            HostError::Name(NameError::Unknown { .. }) | HostError::NoOperation(_) => {
                (StatusCode::NOT_FOUND, "not-found")
            }
            HostError::Vm {
                source: VmError::Bad(_),
                ..
            } => (StatusCode::BAD_REQUEST, "invalid"),
            HostError::Store(error)
            | HostError::Vm {
                source: VmError::Store(error),
                ..
            } if no_space(error) => (StatusCode::INSUFFICIENT_STORAGE, "no-space"),
            HostError::Name(NameError::Ambiguous(..))
            | HostError::Taken { .. }
            | HostError::UnderWay
            | HostError::Broken { .. }
            | HostError::Vm {
                source: VmError::Refused(_),
                ..
            } => (StatusCode::CONFLICT, "conflict"),
            HostError::TooMany(_) => (StatusCode::TOO_MANY_REQUESTS, "failed"),
            HostError::Store(_) | HostError::Vm { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        Self::new(status, code, error.to_string())
    }
}

/// A JSON body.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(JsonRejection::BytesRejection(error)) => {
                Err(ApiError::new(error.status(), "invalid", error.body_text()))
            }
            Err(error) => Err(ApiError::invalid(error.body_text())),
        }
    }
}

/// What stands behind `?`.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        let query = query.map_err(|error: QueryRejection| ApiError::invalid(error.body_text()))?;
        Ok(Self(query.0))
    }
}

/// The key by which a request that is sent again is known.
pub(crate) fn key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= LONGEST_KEY => Ok(Some(key.into())),
        _ => Err(ApiError::invalid(format!(
            "an Idempotency-Key has 1 to {LONGEST_KEY} printable characters"
        ))),
    }
}
