/* Keeps a VM with one processor that never runs, for as long as the test host lives.
 *
 * Linux patches its own code (include/linux/jump_label.h) when the first VM comes and the last one goes, the scheduler's among
 * it, and when the first processor's APIC is switched off and the last one's on. QEMU 7.2, when its CPUs run on threads of
 * their own, may keep what one of them has translated while another patches it; a CPU that keeps the INT3 of a patch meets it
 * for ever. With this VM around there is nothing to patch. */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void) {
    int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0);
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
    if (vm < 0 || ioctl(vm, KVM_ENABLE_CAP, &split))
        err(1, "no VM with a split irqchip");
    int cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    struct kvm_sregs registers;
    if (cpu < 0 || ioctl(cpu, KVM_GET_SREGS, &registers))
        err(1, "no vCPU");
    /* Its local APIC is switched off for good: IA32_APIC_BASE bit 11. */
    registers.apic_base &= ~(1ull << 11);
    if (ioctl(cpu, KVM_SET_SREGS, &registers))
        err(1, "its APIC stays on");
    for (;;)
        pause();
}
