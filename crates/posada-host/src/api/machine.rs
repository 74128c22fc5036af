//! VMs.

use super::answer::{ApiError, Body, ErrorBody, Query, key};
use crate::host::{Host, failed};
use crate::name;
use crate::policy::State as VmState;
use crate::spec::Spec;
use crate::vm::{Change, View};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Which VMs.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Filter {
    /// Only those in one of these states, with commas between.
    #[serde(default)]
    state: Option<String>,
    /// Only those in whose names this stands.
    #[serde(default)]
    name: Option<String>,
    /// Only those with this label: `KEY` or `KEY=VALUE`.
    #[serde(default)]
    label: Option<String>,
}

impl Filter {
    fn states(&self) -> Result<Option<Vec<VmState>>, ApiError> {
        let Some(text) = &self.state else { return Ok(None) };
        let known = |word: &str| {
            let found = VmState::ALL.into_iter().find(|state| state.name() == word);
            found.ok_or_else(|| {
                let names = VmState::ALL.map(VmState::name);
                let hint = match name::nearest(word, names.into_iter()) {
                    Some(near) => format!("did you mean {near:?}?"),
                    None => format!("states are {}", names.join(", ")),
                };
                ApiError::invalid(format!("there is no state {word:?}; {hint}"))
            })
        };
        text.split(',').map(known).collect::<Result<_, _>>().map(Some)
    }

    fn has_label(&self, view: &View) -> bool {
        let Some(text) = &self.label else { return true };
        let labels = view.spec.as_ref().map(|spec| &spec.labels);
        labels.is_some_and(|labels| match text.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|is| is == value),
            None => labels.contains_key(text),
        })
    }
}

/// List VMs, by name.
#[utoipa::path(get, path = "/v1/vms", params(Filter), responses((status = 200, body = Vec<View>), (status = 400, body = ErrorBody)))]
pub(crate) async fn list(State(host): State<Host>, Query(filter): Query<Filter>) -> Result<Json<Vec<View>>, ApiError> {
    let states = filter.states()?;
    let mut views = host.list();
    views.retain(|view| {
        states.as_ref().is_none_or(|states| states.contains(&view.state))
            && filter
                .name
                .as_ref()
                .is_none_or(|part| view.name.contains(part.as_str()))
            && filter.has_label(view)
    });
    Ok(Json(views))
}

/// A VM that is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Creation {
    /// Its name; without one it gets one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it is to be.
    pub spec: Spec,
}

/// Make a VM. It does not run yet. A request that is sent again with the same `Idempotency-Key` makes no second one.
#[utoipa::path(post, path = "/v1/vms", request_body = Creation,
    params(("idempotency-key" = Option<String>, Header)),
    responses((status = 201, body = View), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody), (status = 507, body = ErrorBody)))]
pub(crate) async fn create(
    State(host): State<Host>,
    headers: HeaderMap,
    Body(creation): Body<Creation>,
) -> Result<(StatusCode, Json<View>), ApiError> {
    let view = host.create(creation.name, creation.spec, key(&headers)?).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// Say all about a VM.
#[utoipa::path(get, path = "/v1/vms/{vm}", params(("vm" = String, Path, description = "Name, id, or the beginning of an id")),
    responses((status = 200, body = View), (status = 404, body = ErrorBody)))]
pub(crate) async fn inspect(State(host): State<Host>, Path(vm): Path<String>) -> Result<Json<View>, ApiError> {
    Ok(Json(host.inspect(&vm)?))
}

/// Change a VM: its restart policy and labels at once, its CPUs and memory from its next start on.
#[utoipa::path(patch, path = "/v1/vms/{vm}", request_body = Change, params(("vm" = String, Path)),
    responses((status = 200, body = View), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(crate) async fn change(
    State(host): State<Host>,
    Path(vm): Path<String>,
    Body(change): Body<Change>,
) -> Result<Json<View>, ApiError> {
    let vm = host.find(&vm)?;
    let changed = vm.change(change).await;
    changed.map_err(|source| failed("change", vm.view().name, source))?;
    Ok(Json(vm.view()))
}

/// Whether what runs is killed first.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Force {
    /// Kill it first if it runs.
    #[serde(default)]
    force: bool,
}

/// Forget a VM.
#[utoipa::path(delete, path = "/v1/vms/{vm}", params(("vm" = String, Path), Force),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn remove(
    State(host): State<Host>,
    Path(vm): Path<String>,
    Query(Force { force }): Query<Force>,
) -> Result<StatusCode, ApiError> {
    host.remove(&vm, force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Naming {
    /// What it is to be called.
    pub name: String,
}

/// Give a VM another name. A process that runs keeps the old one until its next start.
#[utoipa::path(post, path = "/v1/vms/{vm}/rename", request_body = Naming, params(("vm" = String, Path)),
    responses((status = 200, body = View), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn rename(
    State(host): State<Host>,
    Path(vm): Path<String>,
    Body(naming): Body<Naming>,
) -> Result<Json<View>, ApiError> {
    Ok(Json(host.rename(&vm, naming.name).await?))
}

/// Have a VM's vCPUs stand still.
#[utoipa::path(post, path = "/v1/vms/{vm}/pause", params(("vm" = String, Path)),
    responses((status = 200, body = View), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn pause(State(host): State<Host>, Path(vm): Path<String>) -> Result<Json<View>, ApiError> {
    set_paused(&host, &vm, true).await
}

/// Let a paused VM run on.
#[utoipa::path(post, path = "/v1/vms/{vm}/resume", params(("vm" = String, Path)),
    responses((status = 200, body = View), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn resume(State(host): State<Host>, Path(vm): Path<String>) -> Result<Json<View>, ApiError> {
    set_paused(&host, &vm, false).await
}

async fn set_paused(host: &Host, vm: &str, paused: bool) -> Result<Json<View>, ApiError> {
    let vm = host.find(vm)?;
    let doing = if paused { "pause" } else { "resume" };
    let done = vm.set_paused(paused).await;
    done.map_err(|source| failed(doing, vm.view().name, source))?;
    Ok(Json(vm.view()))
}

/// End a VM at once, as pulling its plug would, and wait for its end.
#[utoipa::path(post, path = "/v1/vms/{vm}/kill", params(("vm" = String, Path)),
    responses((status = 200, body = View), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(crate) async fn kill(State(host): State<Host>, Path(vm): Path<String>) -> Result<Json<View>, ApiError> {
    let vm = host.find(&vm)?;
    let mut watch = vm.watch();
    let killed = vm.kill().await;
    killed.map_err(|source| failed("kill", vm.view().name, source))?;
    let _ = watch.wait_for(|view| view.removed || view.pid.is_none()).await;
    Ok(Json(vm.view()))
}

/// Wait until a VM has ended for good: a restart by its policy is no end. The answer comes then, with its exit.
#[utoipa::path(get, path = "/v1/vms/{vm}/wait", params(("vm" = String, Path)),
    responses((status = 200, body = View), (status = 404, body = ErrorBody)))]
pub(crate) async fn wait(State(host): State<Host>, Path(vm): Path<String>) -> Result<Json<View>, ApiError> {
    if let Some(view) = host.removed(&vm) {
        return Ok(Json(view));
    }
    let vm = host.find(&vm)?;
    let mut watch = vm.watch();
    let over = watch.wait_for(|view| view.removed || view.state.is_over()).await;
    let view = over.map(|view| view.clone()).unwrap_or_else(|_| vm.view());
    Ok(Json(view))
}
