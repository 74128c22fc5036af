//! Hard work for a software CPU, in Debian: compilers, interpreters that compile, libraries with tests of their own, and a
//! kernel that changes its code. Results are known, or come out twice by different ways.
//!
//! `make heavy` runs these: they take minutes each, and need `heavy.raw` of `scripts/image`.

use posada_tests::{Folder, Shell, debian_in, heavy_disk, script_disk};
use std::time::Duration;

/// For any one command.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Two CPUs and, if `script` is not empty, that in /tmp/script.
fn start(script: &str) -> (Folder, Shell) {
    let folder = Folder::new();
    let mut launch = debian_in("1536M", &heavy_disk(&folder)).cpus(2).patience(PATIENCE);
    if !script.is_empty() {
        launch = launch.disk(script_disk(&folder, script));
    }
    let mut vm = launch.start();
    vm.prompt();
    let mut shell = vm.shell();
    if !script.is_empty() {
        shell.run("cp /dev/vdb /tmp/script").expect("");
    }
    (folder, shell)
}

fn end(mut shell: Shell) {
    shell.kernel_is_well();
    shell.send("systemctl poweroff\n");
    shell.end().expect_code(0);
}

#[test]
#[ignore = "make heavy"]
fn a_c_project_is_compiled_twice_alike_and_computes() {
    let (_folder, mut shell) = start(include_str!("../guest/compute.lua"));
    for (copy, jobs) in [("one", 1), ("two", 2)] {
        shell
            .run(&format!(
                "mkdir /tmp/{copy} && tar -C /tmp/{copy} --strip-components=1 -xf /usr/src/lua5.4.tar"
            ))
            .expect("");
        // In the same folder: its name would be in what assert() says.
        shell
            .run(&format!("ln -sfn /tmp/{copy} /tmp/lua && cd /tmp/lua/src"))
            .expect("");
        shell
            .run(&format!(
                "make -s -j{jobs} generic MYCFLAGS=-Wno-date-time >/tmp/log 2>&1 || {{ tail /tmp/log; false; }}"
            ))
            .expect("");
    }
    shell
        .run("cd /tmp; for file in one/src/*.o one/src/lua; do cmp $file two/${file#one/} || exit; done")
        .expect("");
    let expected = "primes\t9592\nqueens\t92\nwords\t100000\t00004\t0ffff\t97026\npi\t3.141591653590";
    let known = shell.run("two/src/lua script").success().output.clone();
    assert_eq!(known, expected);
    // As another compiler would have it.
    shell
        .run("cd one/src && make -s clean && make -s -j2 generic MYCFLAGS='-O3 -march=native' >/tmp/log 2>&1")
        .expect("");
    shell.run("./lua /tmp/script").expect(expected);
    end(shell);
}

#[test]
#[ignore = "make heavy"]
fn pythons_own_tests_pass() {
    let (_folder, mut shell) = start("");
    let modules = "test_math test_cmath test_float test_complex test_long test_int test_fractions test_decimal \
        test_statistics test_random test_struct test_array test_re test_unicode test_bytes test_hash test_hashlib test_zlib \
        test_lzma test_bz2 test_json test_pickle test_set test_dict test_sort test_heapq test_bisect test_generators \
        test_thread test_threading_local test_queue test_mmap test_memoryview test_ctypes";
    let answer = shell.run(&format!(
        "cd /tmp && python3 -m test -j2 --timeout 1500 {modules} >log 2>&1; echo $?; tail -25 log"
    ));
    assert!(
        answer.output.starts_with("0\n") && answer.output.contains("result: SUCCESS"),
        "{}",
        answer.output
    );
    end(shell);
}

#[test]
#[ignore = "make heavy"]
fn stress_verifies_what_it_computes() {
    let (_folder, mut shell) = start("");
    for what in [
        "--cpu 2 --cpu-method all -t 40",
        // Without those that take several times the host's L3 cache: that may be more than the VM has, and when the kernel
        // kills one for want of memory, systemd ends the shell with it.
        "--sequential 2 --class cpu-cache -t 1 --exclude stream,flushcache,llc-affinity,prefetch",
        "--vm 2 --vm-bytes 96M --vm-method all -t 30",
        "--fork 2 --switch 2 --futex 2 --mmap 2 --mremap 2 --fault 2 --sigsegv 2 --sigfpe 2 --sigtrap 2 -t 20",
        "--matrix 2 --qsort 2 --tree 2 --str 2 --crypt 2 --fp-error 2 --nop 2 --jpeg 2 -t 20",
    ] {
        let answer = shell.run(&format!(
            "cd /tmp && stress-ng --verify --oomable {what} >log 2>&1; echo $?; tail -12 log"
        ));
        assert!(
            answer.output.starts_with("0\n") && !answer.output.contains("fail:"),
            "{what}: {}",
            answer.output
        );
    }
    end(shell);
}

#[test]
#[ignore = "make heavy"]
fn openssl_gives_known_answers() {
    let (_folder, mut shell) = start("");
    // FIPS 180-4 and 202, RFC 1321: "abc".
    for (digest, expected) in [
        ("md5", "900150983cd24fb0d6963f7d28e17f72"),
        ("sha1", "a9993e364706816aba3e25717850c26c9cd0d89d"),
        (
            "sha256",
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        ),
        (
            "sha512",
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        ),
        (
            "sha3-256",
            "3a985da74fe225b2045c172d6bd390bd855f086e3e9d525b46bfe24511431532",
        ),
    ] {
        shell
            .run(&format!("printf abc | openssl dgst -{digest} -r | cut -d' ' -f1"))
            .expect(expected);
    }
    // A million times "a", long enough for the fastest code there is.
    shell
        .run("head -c 1000000 /dev/zero | tr '\\0' a | openssl dgst -sha256 -r | cut -d' ' -f1")
        .expect("cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    // SP 800-38A, F.1.1 and F.5.1 (first blocks).
    let block = "printf '\\x6b\\xc1\\xbe\\xe2\\x2e\\x40\\x9f\\x96\\xe9\\x3d\\x7e\\x11\\x73\\x93\\x17\\x2a'";
    let hex = "| od -An -v -tx1 | tr -d ' \\n'";
    let key = "2b7e151628aed2a6abf7158809cf4f3c";
    shell
        .run(&format!("{block} | openssl enc -aes-128-ecb -nopad -K {key} {hex}"))
        .expect("3ad77bb40d7a3660a89ecaf32466ef97");
    shell
        .run(&format!(
            "{block} | openssl enc -aes-128-ctr -K {key} -iv f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff {hex}"
        ))
        .expect("874d6191b620e3261bef6864990db6ce");
    // What is encrypted with one implementation is decrypted with another: those without AES-NI, AVX and the like.
    shell
        .run("cd /tmp && seq 1000000 >plain && sha256sum plain >sums")
        .expect("");
    for cipher in [
        "aes-256-cbc",
        "aes-128-ctr",
        "camellia-192-cbc",
        "chacha20",
        "aria-256-cbc",
    ] {
        let crypt = format!("openssl enc -{cipher} -pbkdf2 -pass pass:word");
        shell
            .run(&format!(
                "{crypt} -in plain -out coded && OPENSSL_ia32cap=0:0 {crypt} -d -in coded | cmp - plain"
            ))
            .expect("");
    }
    for (kind, option) in [
        ("rsa", "rsa_keygen_bits:2048"),
        ("ec", "ec_paramgen_curve:P-256"),
        ("ec", "ec_paramgen_curve:P-384"),
    ] {
        shell
            .run(&format!(
                "openssl genpkey -quiet -algorithm {kind} -pkeyopt {option} -out key 2>/dev/null || \
                 openssl genpkey -algorithm {kind} -pkeyopt {option} -out key 2>/dev/null; \
                 openssl pkey -in key -pubout -out public && openssl dgst -sha256 -sign key -out signature plain && \
                 OPENSSL_ia32cap=0:0 openssl dgst -sha256 -verify public -signature signature plain"
            ))
            .expect("Verified OK");
    }
    shell
        .run("openssl speed -seconds 1 -bytes 8192 -evp aes-256-gcm 2>&1 | tail -1")
        .contains("AES-256-GCM");
    shell
        .run("openssl speed -seconds 1 rsa2048 ecdsap256 ecdhx25519 >log 2>&1 || tail log")
        .expect("");
    end(shell);
}

#[test]
#[ignore = "make heavy"]
fn what_is_packed_is_unpacked() {
    let (_folder, mut shell) = start("");
    // Text, programs, and what cannot be made smaller.
    shell
        .run("cd /tmp && (seq 100000; cat /usr/bin/gcc-12 /usr/lib/x86_64-linux-gnu/libc.so.6; head -c 1000000 /dev/urandom) >plain")
        .expect("");
    for (pack, unpack) in [
        ("zstd -q -1 -T2", "zstd -q -d"),
        ("zstd -q -19 -T2", "zstd -q -d"),
        ("zstd -q -12 --long=25", "zstd -q -d --long=25"),
        ("xz -0 -T2 --block-size=1MiB", "xz -d"),
        ("xz -6", "xz -d"),
        ("xz -6 --x86 --lzma2", "xz -d"),
        ("bzip2 -9", "bzip2 -d"),
        ("gzip -9", "gzip -d"),
    ] {
        shell
            .run(&format!("{pack} <plain >packed && {unpack} <packed | cmp - plain"))
            .expect("");
    }
    end(shell);
}

#[test]
#[ignore = "make heavy"]
fn javascript_compiled_is_javascript_interpreted() {
    let (_folder, mut shell) = start(include_str!("../guest/compute.js"));
    let interpreted = shell
        .run("node --jitless /tmp/script 2>/dev/null")
        .success()
        .output
        .clone();
    assert_eq!(interpreted.lines().count(), 12, "{interpreted}");
    for options in [
        "",
        "--always-sparkplug",
        "--always-opt",
        "--no-lazy --stress-compaction",
        "--single-threaded",
    ] {
        shell.run(&format!("node {options} /tmp/script")).expect(&interpreted);
    }
    end(shell);
}

#[test]
#[ignore = "make heavy"]
fn a_kernel_takes_modules_tracers_and_probes_in_and_out() {
    let (_folder, mut shell) = start("");
    // Its own choice of the fastest code, by trying all of it; and sums that must come out.
    for _ in 0..5 {
        shell.run("modprobe raid6_pq && modprobe -r raid6_pq").expect("");
    }
    shell
        .run("for i in 1 2 3 4 5 6 7 8 9 10; do modprobe dummy && modprobe -r dummy || exit; done")
        .expect("");
    shell.run("dmesg | grep -c 'raid6: using algorithm'").expect("5");
    shell
        .run(
            "mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null; cd /sys/kernel/tracing && cat available_tracers",
        )
        .success();
    // Work on both CPUs meanwhile.
    shell.run("(while [ ! -e /tmp/stop ]; do ls -lR /usr/lib >/dev/null; done) & (while [ ! -e /tmp/stop ]; do :; done) &").success();
    let tracers = shell.run("cat available_tracers").success().output.clone();
    for tracer in ["function", "function_graph"]
        .into_iter()
        .filter(|tracer| tracers.split(' ').any(|name| name == *tracer))
    {
        for _ in 0..5 {
            shell
                .run(&format!(
                    "echo {tracer} >current_tracer && sleep 0.3 && echo nop >current_tracer"
                ))
                .expect("");
        }
        shell
            .run(&format!("echo {tracer} >current_tracer; ls / >/dev/null; head -50 trace | grep -c '()\\|<-'; echo nop >current_tracer"))
            .success();
    }
    assert!(tracers.contains("nop"), "{tracers}");
    for round in 0..10 {
        shell
            .run(&format!(
                "echo 'p:in{round} do_sys_openat2' >kprobe_events && echo 'r:out{round} do_sys_openat2 $retval' >>kprobe_events && \
                 echo 1 >events/kprobes/enable && cat /etc/hostname >/dev/null && \
                 grep -c -e in{round} -e out{round} kprobe_profile; \
                 echo 0 >events/kprobes/enable && echo >kprobe_events && echo >trace"
            ))
            .expect("2");
    }
    shell.run("touch /tmp/stop; wait; cd /").success();
    end(shell);
}
