//! The API: HTTP/1.1 on a Unix socket, JSON, under `/v1`.
//!
//! What is here is described in `docs/openapi.json`, which is made from this code ([`openapi`]).

mod answer;
mod machine;
mod metrics;
mod stream;
mod work;

use crate::host::Host;
use answer::ApiError;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use utoipa::openapi::OpenApi as Description;
use utoipa::{OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use answer::ErrorBody;
pub use machine::{Creation, Naming};
pub use stream::Statistics;

/// The most bytes of a request's body.
const LARGEST_BODY: usize = 256 << 10;

#[derive(OpenApi)]
#[openapi(info(
    title = "Posada",
    description = "VMs of one user on one host. The API is served on a Unix socket; who can open the socket can do all of this.",
    license(name = "Apache-2.0 OR MIT")
))]
struct Documentation;

/// What answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The daemon's version.
    pub posada: String,
    /// The API's.
    pub api: String,
    /// The daemon's process.
    pub pid: u32,
    /// Milliseconds since its start.
    pub uptime_ms: u64,
}

/// Say which daemon this is.
#[utoipa::path(get, path = "/v1", responses((status = 200, body = Version)))]
async fn version(State(host): State<Host>) -> Json<Version> {
    Json(Version {
        posada: env!("CARGO_PKG_VERSION").into(),
        api: "v1".into(),
        pid: std::process::id(),
        uptime_ms: host.uptime().as_millis().try_into().unwrap_or(u64::MAX),
    })
}

fn described() -> (Router<Host>, Description) {
    OpenApiRouter::with_openapi(Documentation::openapi())
        .routes(routes!(version))
        .routes(routes!(machine::list, machine::create))
        .routes(routes!(machine::inspect, machine::change, machine::remove))
        .routes(routes!(machine::rename))
        .routes(routes!(machine::pause))
        .routes(routes!(machine::resume))
        .routes(routes!(machine::kill))
        .routes(routes!(machine::wait))
        .routes(routes!(work::start))
        .routes(routes!(work::stop))
        .routes(routes!(work::restart))
        .routes(routes!(work::list))
        .routes(routes!(work::look, work::cancel))
        .routes(routes!(stream::logs))
        .routes(routes!(stream::stats))
        .routes(routes!(stream::console))
        .routes(routes!(stream::vsock))
        .routes(routes!(stream::events))
        .routes(routes!(metrics::metrics))
        .split_for_parts()
}

/// The API's description, as OpenAPI 3.1.
pub fn openapi() -> String {
    let (_, description) = described();
    // Of plain data it cannot fail.
    description.to_pretty_json().unwrap_or_default() + "\n"
}

/// Everything that is served.
pub fn router(host: Host) -> Router {
    let (router, _) = described();
    router
        .route(
            "/v1/openapi.json",
            get(async || ([("content-type", "application/json")], openapi())),
        )
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "not-found", "there is nothing at this address"))
        .method_not_allowed_fallback(async || {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            ApiError::new(status, "invalid", "this address does not take this method")
        })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .layer(middleware::from_fn_with_state(host.clone(), count))
        .with_state(host)
}

async fn count(State(host): State<Host>, request: Request, next: Next) -> Response {
    host.requests.fetch_add(1, Ordering::Relaxed);
    next.run(request).await.into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openapi_in_the_documentation_is_this_code_s() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
        if std::env::var_os("POSADA_WRITE_OPENAPI").is_some() {
            std::fs::write(path, openapi()).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            kept == openapi(),
            "docs/openapi.json is not current; POSADA_WRITE_OPENAPI=1 cargo test -p posada-host openapi writes it"
        );
    }
}
