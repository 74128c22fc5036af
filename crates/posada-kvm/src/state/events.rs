//! What waits for a processor, and whether it executes.

use crate::error::Error;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI,
    kvm_mp_state, kvm_vcpu_events,
};
use posada_engine::{Activity, Events, PendingException};

/// Vectors of INT3 and INTO.
const SOFTWARE_EXCEPTIONS: [u8; 2] = [3, 4];

/// Whether a processor executes.
pub(super) fn activity(state: kvm_mp_state) -> Result<Activity, Error> {
    match state.mp_state {
        KVM_MP_STATE_RUNNABLE => Ok(Activity::Running),
        KVM_MP_STATE_HALTED => Ok(Activity::Halted),
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
            Ok(Activity::WaitingForStartup)
        }
        other => Err(Error::State(format!(
            "KVM has a processor in state {other}, which no other engine knows"
        ))),
    }
}

/// The same for KVM.
pub(super) fn mp_state(activity: Activity) -> kvm_mp_state {
    let mp_state = match activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitingForStartup => KVM_MP_STATE_INIT_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

/// For a processor that waits for a SIPI which is there already.
pub(super) fn startup() -> kvm_mp_state {
    kvm_mp_state {
        mp_state: KVM_MP_STATE_SIPI_RECEIVED,
    }
}

/// What waits for a processor.
pub(super) fn to_portable(events: &kvm_vcpu_events) -> Result<Events, Error> {
    if events.smi.smm != 0 || events.smi.pending != 0 {
        return Err(Error::State(
            "the processor is in system management mode, which no other engine knows".into(),
        ));
    }
    let raised = events.exception;
    let exception = (raised.injected | raised.pending != 0 && !SOFTWARE_EXCEPTIONS.contains(&raised.nr)).then_some(
        PendingException {
            vector: raised.nr,
            error: (raised.has_error_code != 0).then_some(raised.error_code),
        },
    );
    let interrupt = events.interrupt;
    let nmi = events.nmi;
    let shadow = |bit: u32| u32::from(interrupt.shadow) & bit != 0;
    Ok(Events {
        exception,
        interrupt: (interrupt.injected != 0 && interrupt.soft == 0).then_some(interrupt.nr),
        nmi_pending: nmi.pending | nmi.injected != 0,
        // One in delivery blocks others only once it is delivered.
        nmi_blocked: nmi.masked != 0 && nmi.injected == 0,
        sti_shadow: shadow(KVM_X86_SHADOW_INT_STI),
        mov_ss_shadow: shadow(KVM_X86_SHADOW_INT_MOV_SS),
        init_pending: events.smi.latched_init != 0,
        // A SIPI has been acted on when the activity was asked for.
        startup: None,
    })
}

/// The same for KVM.
pub(super) fn from_portable(events: &Events) -> kvm_vcpu_events {
    let mut raw = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(exception) = events.exception {
        raw.exception.injected = 1;
        raw.exception.nr = exception.vector;
        raw.exception.has_error_code = exception.error.is_some().into();
        raw.exception.error_code = exception.error.unwrap_or(0);
    }
    if let Some(vector) = events.interrupt {
        raw.interrupt.injected = 1;
        raw.interrupt.nr = vector;
    }
    raw.nmi.pending = events.nmi_pending.into();
    raw.nmi.masked = events.nmi_blocked.into();
    let shadow = |on: bool, bit: u32| if on { bit as u8 } else { 0 };
    raw.interrupt.shadow =
        shadow(events.sti_shadow, KVM_X86_SHADOW_INT_STI) | shadow(events.mov_ss_shadow, KVM_X86_SHADOW_INT_MOV_SS);
    if events.init_pending {
        raw.flags |= KVM_VCPUEVENT_VALID_SMM;
        raw.smi.latched_init = 1;
    }
    if let Some(vector) = events.startup {
        raw.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        raw.sipi_vector = vector.into();
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_engines_know_comes_back_as_it_went() {
        let events = Events {
            exception: Some(PendingException {
                vector: 14,
                error: Some(2),
            }),
            interrupt: Some(0x31),
            nmi_pending: true,
            nmi_blocked: true,
            sti_shadow: true,
            mov_ss_shadow: false,
            init_pending: true,
            startup: None,
        };
        assert_eq!(to_portable(&from_portable(&events)).unwrap(), events);
        for activity in [Activity::Running, Activity::Halted, Activity::WaitingForStartup] {
            assert_eq!(super::activity(mp_state(activity)).unwrap(), activity);
        }
    }

    #[test]
    fn what_only_kvm_knows_is_told_in_common_terms() {
        let mut raw = kvm_vcpu_events::default();
        (raw.interrupt.injected, raw.interrupt.soft, raw.interrupt.nr) = (1, 1, 0x80);
        (raw.exception.injected, raw.exception.nr) = (1, 3);
        (raw.nmi.injected, raw.nmi.masked) = (1, 1);
        let events = to_portable(&raw).unwrap();
        assert_eq!((events.interrupt, events.exception), (None, None));
        assert!(events.nmi_pending && !events.nmi_blocked);
        raw.smi.smm = 1;
        assert!(to_portable(&raw).unwrap_err().to_string().contains("system management"));
        let stopped = kvm_mp_state { mp_state: 5 };
        assert!(super::activity(stopped).is_err());
    }
}
