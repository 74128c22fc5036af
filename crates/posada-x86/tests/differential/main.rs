//! Differential instruction test: see [`generate`].
mod forms;
mod generate;
mod layout;
mod native;
mod operands;
mod rng;
mod state;
mod trampoline;
mod values;

#[test]
fn coverage() {
    use state::*;
    let (forms, skipped) = forms::all();
    println!("{} forms, {} skipped", forms.len(), skipped.len());
    let mut g = generate::Generator::new();
    let mut native = native::Native::new();
    let mut total = std::time::Duration::ZERO;
    let mut gen_time = std::time::Duration::ZERO;
    let mut ends = [0u64; 3];
    let mut never = vec![];
    let mut unmade = vec![];
    let mut faults = std::collections::BTreeMap::<String, u32>::new();
    let n = 128;
    for form in &forms {
        let t = std::time::Instant::now();
        let mut made = 0;
        for s in 0..n {
            if g.make(form, s, &mut native.cases()[s as usize]) {
                made += 1
            } else {
                break;
            }
        }
        gen_time += t.elapsed();
        if made < n {
            unmade.push(form.code);
            continue;
        }
        let t = std::time::Instant::now();
        let a: Vec<Outcome> = native.run(n as usize).to_vec();
        total += t.elapsed();
        let b = native.run(n as usize).to_vec();
        let mut retired = 0;
        for (i, (x, y)) in a.iter().zip(&b).enumerate() {
            ends[x.end as usize] += 1;
            retired += (x.end == End::Retired) as u32;
            if x.end == End::Raised {
                *faults.entry(format!("{} {:x}", x.vector, x.error)).or_default() += 1
            }
            if x.end == End::Died {
                println!("DIED {:?} {i}", form.code);
            }
            let mut diffs = vec![];
            if x.end != y.end || x.vector != y.vector || x.error != y.error || x.address != y.address {
                diffs.push("end")
            }
            if x.state.gpr != y.state.gpr {
                diffs.push("gpr")
            }
            if x.state.rip != y.state.rip {
                diffs.push("rip")
            }
            if x.state.rflags != y.state.rflags {
                diffs.push("rflags")
            }
            if x.state.area != y.state.area {
                diffs.push("area");
            }
            if x.state.selectors != y.state.selectors {
                diffs.push("sel");
            }
            if x.state.fs_base != y.state.fs_base {
                diffs.push("fs");
            }
            if x.lines() != y.lines() {
                diffs.push("mem")
            }
            if !diffs.is_empty() {
                println!("NONDET {:?} {i} {diffs:?}", form.code);
                if diffs == ["area"] {
                    for k in 0..832 {
                        if x.state.area[k] != y.state.area[k] {
                            print!("{k} ");
                        }
                    }
                    println!();
                }
            }
        }
        if retired < 60 {
            never.push((form.code, retired));
        }
    }
    println!("unmade {unmade:?}\nnever {never:?}\nends {ends:?} native {total:?} gen {gen_time:?}\n{faults:?}");
}
