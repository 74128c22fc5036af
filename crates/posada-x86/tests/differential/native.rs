//! The real CPU: a child process that can do nothing but run cases (seccomp), watched by the parent.
//!
//! The child gets batches of cases through shared memory and a byte on a pipe. It allocates nothing, so that a fork of a
//! threaded test process is safe. When it dies or hangs, the parent marks the case that it was running and starts another.

use crate::layout::{CODE, CODE_PAGES, DATA, DATA_PAGES, Memory, PAGE};
use crate::state::{Case, End, Outcome};
use crate::trampoline::{self, CONTEXT, Context};
use std::io::Error;
use std::sync::atomic::{AtomicU32, Ordering};

/// Cases in a batch.
pub const BATCH: usize = 256;
/// Milliseconds without an answer after which a child hangs: a whole batch takes a hundredth of this.
const PATIENCE: libc::c_int = 20_000;

#[repr(C)]
struct Shared {
    /// Case to begin with, one beyond the last, and the one that runs now.
    first: AtomicU32,
    end: AtomicU32,
    now: AtomicU32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The child process and the memory shared with it.
pub struct Native {
    shared: *mut Shared,
    /// None only while one is being replaced.
    child: Option<Child>,
}

struct Child {
    process: libc::pid_t,
    requests: libc::c_int,
    answers: libc::c_int,
}

fn check(result: libc::c_int, what: &str) -> libc::c_int {
    assert!(result >= 0, "{what}: {}", Error::last_os_error());
    result
}

/// Maps `length` bytes; `address` 0 leaves the place to the kernel.
/// Every page is there at once: an error code tells whether it is.
fn map(address: u64, length: usize, rights: libc::c_int, file: libc::c_int, offset: u64) -> *mut u8 {
    let place = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let kind = if file < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: never replaces a mapping.
    let pointer = unsafe {
        libc::mmap(
            address as *mut _,
            length,
            rights,
            libc::MAP_SHARED | libc::MAP_POPULATE | place | kind,
            file,
            offset as i64,
        )
    };
    assert_ne!(
        pointer,
        libc::MAP_FAILED,
        "mapping {length:#x} bytes at {address:#x}: {}",
        Error::last_os_error()
    );
    pointer.cast()
}

const READ: libc::c_int = libc::PROT_READ;
const WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const EXECUTE: libc::c_int = libc::PROT_READ | libc::PROT_EXEC;

/// Maps the two windows and their writable aliases.
fn windows() -> Memory {
    // SAFETY: a plain system call with a constant name.
    let file = check(
        unsafe { libc::memfd_create(c"differential".as_ptr(), libc::MFD_CLOEXEC) },
        "memfd_create",
    );
    let (data, code) = (DATA_PAGES.len() * PAGE as usize, CODE_PAGES * PAGE as usize);
    // SAFETY: a plain system call.
    check(unsafe { libc::ftruncate(file, (data + code) as i64) }, "ftruncate");
    for (index, (page, write)) in DATA_PAGES.into_iter().enumerate() {
        let rights = if write { WRITE } else { READ };
        map(DATA + page * PAGE, PAGE as usize, rights, file, index as u64 * PAGE);
    }
    map(CODE, code, EXECUTE, file, data as u64);
    let alias = map(0, data + code, WRITE, file, 0);
    // SAFETY: as many pages as `Memory` wants, and nobody else knows them.
    unsafe { Memory::new(alias, alias.add(data)) }
}

/// The child: never returns.
fn serve(shared: &mut Shared, requests: libc::c_int, answers: libc::c_int) -> ! {
    let mut memory = windows();
    map(CONTEXT, size_of::<Context>(), WRITE, -1, 0);
    // SAFETY: system calls about this process alone; from the last on it can only read, write, return from signals and exit.
    unsafe {
        trampoline::install();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        check(
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT),
            "prctl(PR_SET_SECCOMP)",
        );
    }
    let mut byte = 0u8;
    loop {
        // SAFETY: reads into a byte of our own.
        if unsafe { libc::read(requests, (&raw mut byte).cast(), 1) } != 1 {
            // SAFETY: ends this process.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        }
        let (first, end) = (shared.first.load(Ordering::Acquire), shared.end.load(Ordering::Acquire));
        for index in first..end {
            shared.now.store(index, Ordering::Release);
            let case = &shared.cases[index as usize];
            let outcome = &mut shared.outcomes[index as usize];
            memory.prepare(case);
            // SAFETY: the handlers are installed and the code is prepared.
            unsafe { trampoline::run(case, outcome) };
            memory.collect(outcome);
        }
        // SAFETY: writes a byte of our own.
        unsafe { libc::write(answers, (&raw const byte).cast(), 1) };
    }
}

impl Child {
    fn start(shared: *mut Shared) -> Self {
        let (mut to, mut from) = ([0; 2], [0; 2]);
        // SAFETY: plain system calls; the child allocates and locks nothing that a thread of the parent might hold.
        unsafe {
            check(libc::pipe2(to.as_mut_ptr(), libc::O_CLOEXEC), "pipe");
            check(libc::pipe2(from.as_mut_ptr(), libc::O_CLOEXEC), "pipe");
            let process = check(libc::fork(), "fork");
            if process == 0 {
                // Nothing else stays open: the pipes of another test's child would never seem closed.
                for file in 3..1024 {
                    if file != to[0] && file != from[1] {
                        libc::close(file);
                    }
                }
                serve(&mut *shared, to[0], from[1]);
            }
            libc::close(to[0]);
            libc::close(from[1]);
            Self {
                process,
                requests: to[1],
                answers: from[0],
            }
        }
    }

    /// Has a batch run; false when the child died or hung.
    fn answers(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.answers,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut byte = 0u8;
        // SAFETY: plain system calls on memory of our own.
        unsafe {
            libc::write(self.requests, (&raw const byte).cast(), 1);
            libc::poll(&mut poll, 1, PATIENCE) == 1 && libc::read(self.answers, (&raw mut byte).cast(), 1) == 1
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child and pipes, once.
        unsafe {
            libc::kill(self.process, libc::SIGKILL);
            libc::waitpid(self.process, std::ptr::null_mut(), 0);
            libc::close(self.requests);
            libc::close(self.answers);
        }
    }
}

impl Native {
    pub fn new() -> Self {
        // SAFETY: reads the auxiliary vector. Bit 1 of HWCAP2 is the kernel's leave to use the FSGSBASE instructions.
        let capable = unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0 && std::is_x86_feature_detected!("avx2");
        assert!(
            capable,
            "the differential test needs a CPU with AVX2 and FSGSBASE and a kernel that allows them"
        );
        let shared = map(0, size_of::<Shared>(), WRITE, -1, 0).cast();
        Self {
            shared,
            child: Some(Child::start(shared)),
        }
    }

    /// Where to put the cases of the next batch.
    pub fn cases(&mut self) -> &mut [Case; BATCH] {
        // SAFETY: mapped; the child looks at cases only between `submit` and `finish`.
        unsafe { &mut (*self.shared).cases }
    }

    /// Runs the first `count` cases and gives them back with their outcomes.
    pub fn run(&mut self, count: usize) -> (&[Case], &[Outcome]) {
        // SAFETY: mapped for good; the counters are atomic.
        let shared = unsafe { &*self.shared };
        let mut first = 0;
        while first < count {
            shared.first.store(first as u32, Ordering::Release);
            shared.end.store(count as u32, Ordering::Release);
            if self.child.as_ref().is_some_and(Child::answers) {
                break;
            }
            let died = shared.now.load(Ordering::Acquire) as usize;
            // The old one must be gone before anybody else writes here.
            self.child = None;
            // SAFETY: no child runs.
            unsafe { (*self.shared).outcomes[died].end = End::Died };
            self.child = Some(Child::start(self.shared));
            first = died + 1;
        }
        (&shared.cases[..count], &shared.outcomes[..count])
    }
}
