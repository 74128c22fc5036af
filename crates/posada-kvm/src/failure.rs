//! Exits after which a VM cannot go on, as sentences for people: what happened and what helps.

use kvm_bindings::kvm_run;

const EMULATION: u32 = 1;
const EXCEPTIONS: u32 = 2;
const DELIVERY: u32 = 3;
const UNEXPECTED: u32 = 4;

/// The instruction's bytes come with the failure.
const WITH_BYTES: u64 = 1;

const WAY_OUT: &str = "run the VM with --accel emulate";

/// KVM_EXIT_INTERNAL_ERROR at `rip`.
pub(crate) fn internal(run: &kvm_run, rip: u64) -> String {
    // SAFETY: plain numbers, which every bit pattern is; the exit's reason says that they are meant.
    let (internal, emulation) = unsafe { (run.__bindgen_anon_1.internal, run.__bindgen_anon_1.emulation_failure) };
    match internal.suberror {
        EMULATION => {
            // SAFETY: as above.
            let instruction = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
            let told = emulation.ndata >= 1 && emulation.flags & WITH_BYTES != 0;
            let length = if told {
                usize::from(instruction.insn_size).min(15)
            } else {
                0
            };
            cannot_emulate(rip, &instruction.insn_bytes[..length])
        }
        EXCEPTIONS => format!("KVM met an exception within an exception at rip {rip:#x} and gave up; {WAY_OUT}"),
        DELIVERY => {
            let [vectoring, reason, ..] = internal.data;
            format!(
                "KVM could not deliver an event to the guest at rip {rip:#x} (event {vectoring:#x}, exit reason \
                 {reason:#x}): its vector table or stack is not in RAM, or this host's virtualization is incomplete; \
                 {WAY_OUT}"
            )
        }
        UNEXPECTED => {
            let [reason, ..] = internal.data;
            format!(
                "the processor left the guest at rip {rip:#x} for a reason that this kernel's KVM does not know ({reason:#x}); \
                 use a newer kernel, or {WAY_OUT}"
            )
        }
        other => {
            format!("KVM failed at rip {rip:#x} with its internal error {other}; see the kernel's log, or {WAY_OUT}")
        }
    }
}

fn cannot_emulate(rip: u64, bytes: &[u8]) -> String {
    let bytes = if bytes.is_empty() {
        "which it does not show".into()
    } else {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        hex.join(" ")
    };
    format!(
        "KVM cannot emulate the instruction at rip {rip:#x} ({bytes}): the guest uses it on a device's memory, or this host's \
         virtualization cannot run it; {WAY_OUT}"
    )
}

/// KVM_EXIT_FAIL_ENTRY.
pub(crate) fn entry(reason: u64, rip: u64) -> String {
    format!(
        "the processor refused to enter the guest at rip {rip:#x} (reason {reason:#x}): it takes the guest's state for \
         impossible, or this host's virtualization is incomplete; {WAY_OUT}"
    )
}

/// KVM_RUN itself failed.
pub(crate) fn refused(error: &kvm_ioctls::Error) -> String {
    let cause = match error.errno() {
        libc::EFAULT => {
            "the host cannot give a page of the guest's memory; free memory on the host, or look for a failing disk under its \
             swap space"
        }
        libc::EHWPOISON => "a page of the guest's memory is on broken RAM; the host's log names it",
        libc::ENODEV | libc::ENXIO | libc::EBADF => {
            "KVM has gone while the VM ran: its module was unloaded or its processor taken away"
        }
        libc::EIO => "KVM has given this VM up; the kernel's log may say why",
        libc::ENOMEM => "the host is out of memory; stop other VMs",
        _ => "the kernel's log may say more",
    };
    format!("KVM cannot run the processor: {error}: {cause}; or {WAY_OUT}")
}

/// An exit that no processor of ours should make.
pub(crate) fn unknown(reason: u32, rip: u64) -> String {
    format!(
        "KVM left the guest at rip {rip:#x} for a reason that Posada does not know (exit {reason}); please report it, and \
         {WAY_OUT}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulation_failure_shows_the_instruction() {
        let mut run = kvm_run::default();
        let mut failure = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_14 {
            suberror: EMULATION,
            ndata: 3,
            flags: WITH_BYTES,
            __bindgen_anon_1: Default::default(),
        };
        let mut insn_bytes = [0; 15];
        insn_bytes[..3].copy_from_slice(&[0x0f, 0x01, 0xd9]);
        failure.__bindgen_anon_1.__bindgen_anon_1 =
            kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_14__bindgen_ty_1__bindgen_ty_1 {
                insn_size: 3,
                insn_bytes,
            };
        run.__bindgen_anon_1.emulation_failure = failure;
        let text = internal(&run, 0x1000);
        assert!(
            text.contains("rip 0x1000 (0f 01 d9)") && text.contains(WAY_OUT),
            "{text}"
        );
        run.__bindgen_anon_1.emulation_failure.flags = 0;
        assert!(internal(&run, 0).contains("does not show"));
    }

    #[test]
    fn every_failure_has_a_cause_and_a_way_out() {
        let mut run = kvm_run::default();
        let mut texts = Vec::new();
        for suberror in 0..6 {
            run.__bindgen_anon_1.internal.suberror = suberror;
            texts.push(internal(&run, 0x1234));
        }
        texts.extend([entry(7, 0x1234), unknown(99, 0x1234)]);
        for text in &texts {
            assert!(text.contains("0x1234") && text.contains(WAY_OUT), "{text}");
        }
        for errno in [libc::EFAULT, libc::ENODEV, libc::EIO, libc::EINVAL] {
            let text = refused(&kvm_ioctls::Error::new(errno));
            assert!(text.contains("os error") && text.contains(WAY_OUT), "{text}");
        }
    }
}
