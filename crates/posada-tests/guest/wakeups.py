"""Wake-ups, timers and interprocessor interrupts in a guest. Each part prints "NAME COUNT WORST", the worst delay in
milliseconds, or ends the program with an assertion. A wake-up that is lost ends it by a watchdog."""
import ctypes, faulthandler, mmap, os, random, signal, socket, threading, time

cpus = sorted(os.sched_getaffinity(0))
now = time.monotonic


def part(run):
    faulthandler.dump_traceback_later(120, exit=True)
    count, worst = run()
    print(f"{run.__name__} {count} {worst * 1000:.1f}", flush=True)


def interrupts(*names):
    with open("/proc/interrupts") as file:
        return sum(
            sum(int(word) for word in line.split()[1:1 + len(cpus)])
            for line in file
            if line.split()[0].rstrip(":") in names
        )


def threads(*works):
    """Runs them at once; the first error is raised here."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=guarded, args=[work]) for work in works]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def ping_pong():
    """Two processes on CPUs of their own: every message wakes the other one."""
    rounds, worst = 3000, 0
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        os.sched_setaffinity(0, {cpus[-1]})
        for _ in range(rounds):
            there.send(there.recv(8) or os._exit(1))
        os._exit(0)
    there.close()
    os.sched_setaffinity(0, {cpus[0]})
    for number in range(rounds):
        start = now()
        here.send(number.to_bytes(8, "little"))
        assert int.from_bytes(here.recv(8), "little") == number
        worst = max(worst, now() - start)
    assert os.waitpid(child, 0)[1] == 0
    os.sched_setaffinity(0, cpus)
    return rounds, worst


def futex():
    """Threads take turns by locks: futexes."""
    turns, rounds, worst = [threading.Lock() for _ in range(4)], 1500, [0]
    for lock in turns:
        lock.acquire()

    def work(own):
        for _ in range(rounds):
            start = now()
            turns[own].acquire()
            worst[0] = max(worst[0], now() - start)
            turns[(own + 1) % len(turns)].release()

    turns[0].release()
    threads(*(lambda own=own: work(own) for own in range(len(turns))))
    return rounds * len(turns), worst[0]


def nanosleep():
    """Nobody wakes early, nobody is forgotten."""
    late = []

    def work(seed):
        chance = random.Random(seed)
        for _ in range(120):
            wanted = chance.uniform(0, 0.01)
            start = now()
            time.sleep(wanted)
            late.append(now() - start - wanted)

    threads(*(lambda seed=seed: work(seed) for seed in range(2 * len(cpus))))
    assert min(late) >= 0, f"woken {min(late)} s too early"
    return len(late), max(late)


def interval():
    """A timer that goes off again and again."""
    every, count, worst = 0.005, 300, 0
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    start = last = now()
    signal.setitimer(signal.ITIMER_REAL, every, every)
    for _ in range(count):
        assert signal.sigtimedwait([signal.SIGALRM], 60), "the timer has stopped"
        worst = max(worst, now() - last - every)
        last = now()
    signal.setitimer(signal.ITIMER_REAL, 0)
    # Ticks that come together are one, so it may be longer.
    assert last - start >= count * every, f"{count} ticks within {last - start} s"
    return count, worst


def membarrier():
    """Interrupts every CPU that runs a thread of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    system_call, register, barrier = 324, 16, 8
    assert libc.syscall(system_call, register, 0, 0) == 0, os.strerror(ctypes.get_errno())
    done, count, worst = threading.Event(), 2000, [0]
    before = interrupts("CAL", "TLB", "RES")

    def busy():
        # memset runs without Python's lock.
        place = ctypes.create_string_buffer(1 << 20)
        while not done.is_set():
            libc.memset(place, 1, len(place))

    def barriers():
        try:
            for _ in range(count):
                start = now()
                assert libc.syscall(system_call, barrier, 0, 0) == 0
                worst[0] = max(worst[0], now() - start)
        finally:
            done.set()

    threads(barriers, *[busy] * (len(cpus) - 1))
    sent = interrupts("CAL", "TLB", "RES") - before
    assert len(cpus) == 1 or sent > count / 20, f"only {sent} interrupts"
    return count, worst[0]


def unmap():
    """Pages that go away while others use the same address space."""
    done, count, worst = threading.Event(), 1000, [0]
    libc = ctypes.CDLL(None)

    def busy():
        place = ctypes.create_string_buffer(1 << 20)
        while not done.is_set():
            libc.memset(place, 2, len(place))

    def unmapping():
        try:
            for number in range(count):
                start = now()
                with mmap.mmap(-1, 16 * 4096) as pages:
                    for at in range(0, len(pages), 4096):
                        assert pages[at] == 0, "a page that is not new"
                        pages[at] = number % 255 + 1
                worst[0] = max(worst[0], now() - start)
        finally:
            done.set()

    threads(unmapping, *[busy] * (len(cpus) - 1))
    return count, worst[0]


for run in ping_pong, futex, nanosleep, interval, membarrier, unmap:
    part(run)
print("all parts done")
