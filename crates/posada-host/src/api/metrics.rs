//! Figures for Prometheus (text format 0.0.4).

use crate::host::Host;
use crate::policy::State as VmState;
use crate::process;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::fmt::Write;
use std::sync::atomic::Ordering;

/// Figures of the daemon and its VMs, for Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain")))]
pub(crate) async fn metrics(State(host): State<Host>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text(&host)).into_response()
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        self.value(name, "", value);
    }
}

fn text(host: &Host) -> String {
    let views = host.list();
    let mut text = Text(String::new());
    text.family("posada_vms", "gauge", "VMs by state.");
    for state in VmState::ALL {
        let count = views.iter().filter(|view| view.state == state).count();
        text.value("posada_vms", &format!("{{state=\"{}\"}}", state.name()), count);
    }
    // Names have no characters that would have to be escaped.
    let label = |id: &str, name: &str| format!("{{id=\"{id}\",name=\"{name}\"}}");
    let live: Vec<_> = views.iter().filter_map(|view| Some((view, view.pid?))).collect();
    text.family("posada_vm_cpu_seconds_total", "counter", "CPU time of a VM's process.");
    for (view, pid) in &live {
        let seconds = process::cpu_ticks(*pid) as f64 / 100.0;
        text.value("posada_vm_cpu_seconds_total", &label(&view.id, &view.name), seconds);
    }
    text.family("posada_vm_resident_bytes", "gauge", "Memory of a VM's process.");
    for (view, pid) in &live {
        text.value(
            "posada_vm_resident_bytes",
            &label(&view.id, &view.name),
            process::resident(*pid),
        );
    }
    text.family(
        "posada_vm_restarts_total",
        "counter",
        "How often a VM was started again.",
    );
    for view in &views {
        text.value("posada_vm_restarts_total", &label(&view.id, &view.name), view.restarts);
    }
    let requests = host.requests.load(Ordering::Relaxed);
    text.one("posada_api_requests_total", "counter", "Requests to the API.", requests);
    let running = host.operations().running();
    text.one("posada_operations_running", "gauge", "Operations under way.", running);
    let uptime = host.uptime().as_secs_f64();
    text.one(
        "posada_uptime_seconds",
        "gauge",
        "Time since the daemon's start.",
        uptime,
    );
    let resident = process::resident(std::process::id());
    text.one(
        "process_resident_memory_bytes",
        "gauge",
        "Memory of the daemon.",
        resident,
    );
    text.0
}
