use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(10);

fn running(policy: RestartPolicy) -> Lifecycle {
    let mut life = Lifecycle::new(policy, false);
    assert_eq!(life.on(Input::Start, Duration::ZERO), Ok(vec![Action::Spawn]));
    assert_eq!(life.on(Input::Up, Duration::ZERO), Ok(vec![]));
    life
}

#[test]
fn a_guest_is_asked_then_terminated_then_killed() {
    let mut life = running(RestartPolicy::Always);
    let asked = life.on(Input::Stop(PATIENCE), SECOND).unwrap();
    assert_eq!(asked, [Action::Ask, Action::Wake(11 * SECOND)]);
    assert_eq!(life.on(Input::Tick, 10 * SECOND), Ok(vec![]), "it has time");
    let told = life.on(Input::Tick, 11 * SECOND).unwrap();
    assert_eq!(told, [Action::Terminate, Action::Wake(11 * SECOND + TERMINATION)]);
    let killed = life.on(Input::Tick, 11 * SECOND + TERMINATION).unwrap();
    assert_eq!(killed, [Action::Kill]);
    assert_eq!(life.on(Input::Ended(Cause::Failure), 20 * SECOND), Ok(vec![]));
    assert_eq!(life.state(Some(Cause::Wish)), State::Stopped, "whatever its policy");
}

#[test]
fn a_guest_that_hears_nothing_is_terminated_at_once() {
    let mut life = running(RestartPolicy::No);
    life.on(Input::Stop(PATIENCE), SECOND).unwrap();
    let told = life.on(Input::Deaf, SECOND).unwrap();
    assert_eq!(told[0], Action::Terminate);
    let mut life = running(RestartPolicy::No);
    life.on(Input::Paused, SECOND).unwrap();
    assert_eq!(life.on(Input::Stop(PATIENCE), SECOND).unwrap()[0], Action::Terminate);
}

#[test]
fn a_guest_that_is_spared_gets_all_the_time_that_it_needs() {
    let mut life = running(RestartPolicy::No);
    life.on(Input::Stop(PATIENCE), SECOND).unwrap();
    life.on(Input::Spare, SECOND).unwrap();
    assert_eq!(life.on(Input::Tick, 1000 * SECOND), Ok(vec![]));
    let again = life.on(Input::Stop(Duration::ZERO), 1000 * SECOND).unwrap();
    assert_eq!(again[0], Action::Terminate);
}

#[test]
fn policies_differ_in_what_they_start_again() {
    use Cause::*;
    use RestartPolicy::*;
    let cases = [
        (No, Done, false),
        (No, Failure, false),
        (OnFailure, Done, false),
        (OnFailure, Failure, true),
        (Always, Done, true),
        (Always, Failure, true),
        (Always, Wish, false),
        (OnFailure, Wish, false),
    ];
    for (policy, cause, again) in cases {
        let mut life = running(policy);
        let actions = life.on(Input::Ended(cause), SECOND).unwrap();
        assert_eq!(!actions.is_empty(), again, "{policy:?} {cause:?}");
        if again {
            assert_eq!(life.state(Some(cause)), State::Restarting);
            assert_eq!(life.on(Input::Tick, SECOND + FIRST_WAIT), Ok(vec![Action::Spawn]));
        }
    }
}

#[test]
fn the_wait_grows_with_failures_and_is_short_again_after_a_steady_run() {
    let mut life = Lifecycle::new(RestartPolicy::Always, false);
    let mut now = Duration::ZERO;
    life.on(Input::Start, now).unwrap();
    let mut before = Duration::ZERO;
    for _ in 0..30 {
        let actions = life.on(Input::Ended(Cause::Failure), now).unwrap();
        let [Action::Wake(until)] = actions[..] else {
            panic!("{actions:?}");
        };
        let waited = until - now;
        assert!(waited >= before && waited <= LONGEST_WAIT);
        (before, now) = (waited, until);
        assert_eq!(life.on(Input::Tick, now), Ok(vec![Action::Spawn]));
    }
    assert_eq!(before, LONGEST_WAIT);
    life.on(Input::Up, now).unwrap();
    now += STEADY;
    let actions = life.on(Input::Ended(Cause::Failure), now).unwrap();
    assert_eq!(actions, [Action::Wake(now + FIRST_WAIT)]);
}

#[test]
fn what_runs_is_removed_only_by_force() {
    let mut life = running(RestartPolicy::Always);
    assert_eq!(life.on(Input::Remove { force: false }, SECOND), Err(Refusal::Runs));
    assert_eq!(life.on(Input::Remove { force: true }, SECOND), Ok(vec![Action::Kill]));
    assert_eq!(life.on(Input::Ended(Cause::Failure), SECOND), Ok(vec![Action::Delete]));
}

#[test]
fn a_fleeting_vm_is_forgotten_when_it_has_ended_or_was_stopped() {
    for stop in [false, true] {
        let mut life = Lifecycle::new(RestartPolicy::No, true);
        life.on(Input::Start, SECOND).unwrap();
        life.on(Input::Up, SECOND).unwrap();
        if stop {
            life.on(Input::Stop(PATIENCE), SECOND).unwrap();
        }
        assert_eq!(life.on(Input::Ended(Cause::Done), SECOND), Ok(vec![Action::Delete]));
    }
}

#[test]
fn a_restart_ends_it_and_starts_it() {
    let mut life = running(RestartPolicy::No);
    life.on(Input::Restart(PATIENCE), SECOND).unwrap();
    assert!(life.wanted(), "a daemon that dies now must start it");
    assert_eq!(life.on(Input::Start, SECOND), Err(Refusal::Stopping));
    assert_eq!(life.on(Input::Ended(Cause::Done), SECOND), Ok(vec![Action::Spawn]));
    assert_eq!(life.state(None), State::Starting);
}

#[test]
fn another_daemon_goes_on_where_the_first_was() {
    let new = |policy| Lifecycle::new(policy, false);
    let (life, actions) = new(RestartPolicy::No).recover(true, 0, Found::Running, SECOND);
    assert_eq!((life.state(None), actions), (State::Running, vec![]));
    let (life, actions) = new(RestartPolicy::No).recover(true, 0, Found::Paused, SECOND);
    assert_eq!((life.state(None), actions), (State::Paused, vec![]));
    // It was being stopped.
    let (life, actions) = new(RestartPolicy::Always).recover(false, 0, Found::Running, SECOND);
    assert_eq!((life.state(None), actions[0]), (State::Stopping, Action::Terminate));
    // It died while nobody looked.
    let found = Found::Nothing(Some(Cause::Failure));
    let (life, actions) = new(RestartPolicy::OnFailure).recover(true, 3, found, SECOND);
    assert_eq!(actions, [Action::Wake(SECOND + wait(4))]);
    assert_eq!(life.state(Some(Cause::Failure)), State::Restarting);
    let (life, actions) = new(RestartPolicy::No).recover(true, 0, found, SECOND);
    assert_eq!((life.state(Some(Cause::Failure)), actions), (State::Failed, vec![]));
    assert!(!life.wanted());
    // It was stopped.
    let (life, actions) = new(RestartPolicy::Always).recover(false, 0, found, SECOND);
    assert_eq!((life.state(Some(Cause::Failure)), actions), (State::Failed, vec![]));
}

#[test]
fn a_fleeting_vm_that_ended_unseen_is_forgotten_and_a_new_one_is_not() {
    for (last, expected) in [(Some(Cause::Done), vec![Action::Delete]), (None, vec![])] {
        let life = Lifecycle::new(RestartPolicy::No, true);
        assert_eq!(life.recover(false, 0, Found::Nothing(last), SECOND).1, expected);
    }
    let life = Lifecycle::new(RestartPolicy::No, true);
    assert_eq!(life.recover(true, 0, Found::Nothing(None), SECOND).1, [Action::Delete]);
}

fn inputs() -> impl Strategy<Value = Input> {
    let patience = prop_oneof![Just(Duration::ZERO), Just(PATIENCE)];
    let cause = prop_oneof![Just(Cause::Done), Just(Cause::Failure), Just(Cause::Wish)];
    prop_oneof![
        3 => Just(Input::Start),
        1 => patience.clone().prop_map(Input::Stop),
        1 => patience.prop_map(Input::Restart),
        1 => Just(Input::Kill),
        1 => Just(Input::Remove { force: false }),
        1 => Just(Input::Remove { force: true }),
        1 => Just(Input::Paused),
        1 => Just(Input::Resumed),
        2 => Just(Input::Up),
        1 => Just(Input::Deaf),
        1 => Just(Input::Spare),
        4 => cause.prop_map(Input::Ended),
        4 => Just(Input::Tick),
    ]
}

fn policies() -> impl Strategy<Value = RestartPolicy> {
    prop_oneof![
        Just(RestartPolicy::No),
        Just(RestartPolicy::OnFailure),
        Just(RestartPolicy::Always)
    ]
}

proptest! {
    /// The world: there is a process or not. Facts that cannot be are not given.
    #[test]
    fn the_laws_hold_whatever_happens(
        policy in policies(),
        fleeting: bool,
        steps in prop::collection::vec((inputs(), 0_u64..20_000), 1..200),
    ) {
        let mut life = Lifecycle::new(policy, fleeting);
        let (mut process, mut deleted, mut stopped) = (false, false, true);
        let mut now = Duration::ZERO;
        for (input, milliseconds) in steps {
            now += Duration::from_millis(milliseconds);
            if matches!(input, Input::Ended(_) | Input::Up | Input::Paused | Input::Resumed) && !process {
                continue;
            }
            if matches!(input, Input::Ended(_)) {
                process = false;
            }
            let before = life.state(None);
            let actions = match life.on(input, now) {
                Ok(actions) => actions,
                Err(_) => {
                    prop_assert_eq!(life.state(None), before, "a refusal changes nothing");
                    continue;
                }
            };
            match input {
                Input::Start | Input::Restart(_) => stopped = false,
                Input::Stop(_) | Input::Kill => stopped = true,
                _ => {}
            }
            for action in actions {
                prop_assert!(!deleted, "a removed VM does nothing");
                match action {
                    Action::Spawn => {
                        prop_assert!(!process, "two processes");
                        prop_assert!(!stopped, "it was stopped");
                        process = true;
                    }
                    Action::Ask | Action::Terminate | Action::Kill => prop_assert!(process, "no process"),
                    Action::Delete => {
                        prop_assert!(!process, "the process of a removed VM");
                        deleted = true;
                    }
                    Action::Wake(at) => prop_assert!(at > now && at - now <= LONGEST_WAIT, "the wait is bounded"),
                }
            }
            prop_assert!(!process || !deleted);
            prop_assert_eq!(life.state(None).is_live() || process, process, "a live state has a process");
        }
        // Whatever came before, whoever stops it and waits has it stopped.
        if process {
            let _ = life.on(Input::Stop(Duration::ZERO), now);
            let killed = life.on(Input::Tick, now + TERMINATION).unwrap();
            prop_assert!(killed.is_empty() || killed == [Action::Kill]);
            let after = life.on(Input::Ended(Cause::Failure), now + TERMINATION).unwrap();
            prop_assert!(after.is_empty() || after == [Action::Delete], "{:?}", after);
        }
    }
}
