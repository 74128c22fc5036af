//! A layer against a plain vector of bytes, and against crashes at every point.

use super::*;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes: three granules and a half below, two more behind.
const BASE: u64 = 7 * 2048;
const SIZE: u64 = 11 * 2048;

fn base_content() -> Vec<u8> {
    (0..BASE).map(|at| (at / SECTOR) as u8 + 1).collect()
}

struct Place {
    folder: tempfile::TempDir,
    digest: Digest,
}

impl Place {
    fn new(size: u64) -> Self {
        let place = Self {
            folder: tempfile::tempdir().unwrap(),
            digest: Digest::of(&base_content()),
        };
        std::fs::write(place.base(), base_content()).unwrap();
        Layer::create(&place.path(), &place.base(), place.digest, size).unwrap();
        place
    }

    fn base(&self) -> PathBuf {
        self.folder.path().join("base")
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("layer")
    }

    fn open(&self) -> Result<Layer, Error> {
        Layer::open(&self.path(), &self.base(), self.digest, false)
    }
}

/// What a guest does with its disk.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || {
        (0..SIZE / SECTOR, 1..=12u64).prop_map(|(first, count)| {
            let offset = first * SECTOR;
            (offset, (count * SECTOR).min(SIZE - offset))
        })
    };
    let step = prop_oneof![
        4 => (range(), 100u8..).prop_map(|((offset, length), value)| Step::Write(offset, length, value)),
        1 => range().prop_map(|(offset, length)| Step::Zero(offset, length)),
        1 => range().prop_map(|(offset, length)| Step::Discard(offset, length)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..24)
}

fn apply<M: Medium>(layer: &Layer<M>, step: &Step) {
    match *step {
        Step::Write(offset, length, value) => layer.write_at(&vec![value; length as usize], offset).unwrap(),
        Step::Zero(offset, length) => layer.write_zeroes(offset, length).unwrap(),
        Step::Discard(offset, length) => layer.discard(offset, length).unwrap(),
        Step::Flush => layer.flush().unwrap(),
        Step::Reopen => {}
    }
}

/// The range that a step changes, and to which value.
fn change(step: &Step) -> Option<(std::ops::Range<usize>, u8)> {
    let range = |offset: u64, length: u64| offset as usize..(offset + length) as usize;
    match *step {
        Step::Write(offset, length, value) => Some((range(offset, length), value)),
        Step::Zero(offset, length) => Some((range(offset, length), 0)),
        Step::Discard(offset, length) => {
            let end = offset + length;
            let (first, last) = (
                offset.next_multiple_of(GRANULE),
                if end == SIZE { end } else { end / GRANULE * GRANULE },
            );
            (first < last).then(|| (range(first, last - first), 0))
        }
        Step::Flush | Step::Reopen => None,
    }
}

fn content<M: Medium>(layer: &Layer<M>) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    layer.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn fresh() -> Vec<u8> {
    let mut bytes = base_content();
    bytes.resize(SIZE as usize, 0);
    bytes
}

/// What was done to the file.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Sync,
}

/// A file in memory that remembers.
#[derive(Clone, Default)]
struct Recorded {
    state: Arc<Mutex<(Vec<u8>, Vec<Op>)>>,
}

impl Recorded {
    fn do_op(bytes: &mut [u8], op: &Op) {
        match op {
            Op::Write(at, data) => bytes[*at as usize..][..data.len()].copy_from_slice(data),
            Op::Punch(at, length) => bytes[*at as usize..][..*length as usize].fill(0),
            Op::Sync => {}
        }
    }

    fn add(&self, op: Op) {
        let (bytes, ops) = &mut *self.state.lock().unwrap();
        Self::do_op(bytes, &op);
        ops.push(op);
    }
}

impl Medium for Recorded {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        bytes.copy_from_slice(&state.0[offset as usize..][..bytes.len()]);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.add(Op::Write(offset, bytes.into()));
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.add(Op::Punch(offset, length));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.add(Op::Sync);
        Ok(())
    }
}

fn header() -> Header {
    Header {
        size: SIZE,
        base_size: BASE,
        base: Digest::of(&base_content()),
    }
}

fn base_file() -> File {
    let file = tempfile::tempfile().unwrap();
    FileExt::write_all_at(&file, &base_content(), 0).unwrap();
    file
}

/// All values that each sector may have after a crash: that of the last flush, and all written since.
fn allowed(steps: &[Step], flushed: usize, begun: usize) -> Vec<Vec<u8>> {
    let mut now: Vec<Vec<u8>> = fresh().iter().map(|byte| vec![*byte]).collect();
    for (at, step) in steps[..begun].iter().enumerate() {
        if let Some((range, value)) = change(step) {
            for values in &mut now[range] {
                if at < flushed {
                    values.clear();
                }
                values.push(value);
            }
        }
    }
    now
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_layer_is_a_disk(steps in steps()) {
        let place = Place::new(SIZE);
        let mut layer = place.open().unwrap();
        let mut model = fresh();
        for step in &steps {
            apply(&layer, step);
            if let Some((range, value)) = change(step) {
                model[range].fill(value);
            }
            if matches!(step, Step::Reopen) {
                drop(layer);
                layer = place.open().unwrap();
            }
            prop_assert!(content(&layer) == model, "after {:?}", step);
        }
        prop_assert_eq!(std::fs::read(place.base()).unwrap(), base_content());
    }

    /// After each operation on the file the host dies. What was synchronized is there; of the rest every operation is there or
    /// not, in any combination; a write may be there in part.
    #[test]
    fn a_crash_loses_nothing_that_was_flushed(steps in steps(), lots in prop::collection::vec(any::<u32>(), 64)) {
        let file = Recorded::default();
        file.state.lock().unwrap().0 = vec![0; (header().data() + SIZE) as usize];
        let layer = Layer::over(file.clone(), base_file(), header(), false).unwrap();
        // How many operations there were when a step began, and when it returned.
        let mut spans = Vec::new();
        for step in &steps {
            let begin = file.state.lock().unwrap().1.len();
            apply(&layer, step);
            spans.push((begin, file.state.lock().unwrap().1.len()));
        }
        let ops = file.state.lock().unwrap().1.clone();
        for crash in 0..=ops.len() {
            let synced = ops[..crash].iter().rposition(|op| matches!(op, Op::Sync)).map_or(0, |at| at + 1);
            let mut bytes = vec![0; (header().data() + SIZE) as usize];
            for (at, op) in ops[..crash].iter().enumerate() {
                let lot = lots[(at * 7 + crash) % lots.len()];
                match op {
                    _ if at < synced || lot % 3 == 0 => Recorded::do_op(&mut bytes, op),
                    Op::Write(to, data) if lot % 3 == 1 => {
                        let sectors = data.len() / SECTOR as usize;
                        let whole = lot as usize / 3 % (sectors + 1) * SECTOR as usize;
                        Recorded::do_op(&mut bytes, &Op::Write(*to, data[..whole].into()));
                    }
                    _ => {}
                }
            }
            let flushed = steps.iter().zip(&spans).rposition(|(step, span)| matches!(step, Step::Flush) && span.1 <= crash);
            let flushed = flushed.map_or(0, |at| at + 1);
            let begun = spans.iter().filter(|span| span.0 < crash).count().max(flushed);
            // Steps that did nothing to the file may still have begun.
            let begun = spans.iter().rposition(|span| span.0 < crash).map_or(begun, |at| at + 1).max(begun);
            let after = Recorded::default();
            after.state.lock().unwrap().0 = bytes;
            let after = Layer::over(after, base_file(), header(), false).unwrap();
            let found = content(&after);
            for (at, values) in allowed(&steps, flushed, begun).iter().enumerate() {
                prop_assert!(values.contains(&found[at]), "crash {} byte {}: {} not in {:?}", crash, at, found[at], values);
            }
        }
    }
}

#[test]
fn only_what_is_written_takes_space_and_discard_gives_it_back() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new(1 << 40);
    let layer = place.open().unwrap();
    assert_eq!(layer.size(), 1 << 40);
    layer.write_at(&[1; 1 << 20], 1 << 39).unwrap();
    layer.flush().unwrap();
    let space = || std::fs::metadata(place.path()).unwrap().blocks() * 512;
    assert!((1 << 20..(1 << 20) + 65536).contains(&space()), "{}", space());
    assert_eq!(layer.own(), 1 << 20);
    layer.discard(1 << 39, 1 << 20).unwrap();
    assert!(space() < 65536);
    drop(layer);
    let layer = place.open().unwrap();
    let mut bytes = [1; 4096];
    layer.read_at(&mut bytes, 1 << 39).unwrap();
    assert_eq!(bytes, [0; 4096]);
}

#[test]
fn parts_are_located_in_the_longest_runs() {
    let place = Place::new(SIZE);
    let layer = place.open().unwrap();
    layer.write_at(&[9; 4096], 4096).unwrap();
    let data = header().data();
    assert_eq!(layer.locate(512, SIZE - 512), (Source::Base(512), 3584));
    assert_eq!(layer.locate(4096, SIZE - 4096), (Source::Layer(data + 4096), 4096));
    assert_eq!(layer.locate(8192, SIZE - 8192), (Source::Base(8192), BASE - 8192));
    assert_eq!(layer.locate(BASE, SIZE - BASE), (Source::Zero, SIZE - BASE));
}

#[test]
fn requests_beyond_the_disk_and_writes_to_a_read_only_layer_are_refused() {
    let place = Place::new(SIZE);
    let layer = place.open().unwrap();
    for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 2)] {
        let mut bytes = vec![0; length as usize];
        assert!(layer.read_at(&mut bytes, offset).is_err());
        assert!(layer.write_at(&bytes, offset).is_err());
        assert!(layer.discard(offset, length).is_err() && layer.write_zeroes(offset, length).is_err());
    }
    drop(layer);
    let open = || Layer::open(&place.path(), &place.base(), place.digest, true).unwrap();
    let (one, other) = (open(), open());
    assert!(one.write_at(&[1; 512], 0).is_err() && other.discard(0, 4096).is_err());
    assert!(matches!(place.open(), Err(Error::LayerInUse { .. })));
}

#[test]
fn damaged_layers_are_refused() {
    let place = Place::new(SIZE);
    let good = std::fs::read(place.path()).unwrap();
    let file = File::options().write(true).open(place.path()).unwrap();
    let bad_bit = BITMAP + SIZE.div_ceil(GRANULE) / 8;
    for (at, bytes, why) in [
        (0, &b"x"[..], "no layer"),
        (8, b"\x09", "version 9"),
        (17, b"\x77", "header is damaged"),
        (bad_bit, b"\x80", "beyond its disk"),
    ] {
        FileExt::write_all_at(&file, bytes, at).unwrap();
        let error = place.open().unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        FileExt::write_all_at(&file, &good[..8192], 0).unwrap();
    }
    drop(place.open().unwrap());
    let other = Layer::open(&place.path(), &place.base(), Digest::of(b"other"), false).unwrap_err();
    assert!(other.to_string().contains("belongs to the root disk"), "{other}");
    for length in [good.len() as u64 - 1, 100, 0] {
        file.set_len(length).unwrap();
        assert!(matches!(place.open(), Err(Error::Layer { .. })), "{length}");
    }
    assert!(
        Layer::create(&place.path(), &place.base(), place.digest, SIZE).is_err(),
        "written over"
    );
    let path = place.folder.path().join("small");
    for size in [0, BASE - 2048, SIZE + 1, LARGEST + 512] {
        assert!(
            Layer::create(&path, &place.base(), place.digest, size).is_err(),
            "{size}"
        );
    }
    assert!(!path.exists());
}

#[test]
fn threads_that_write_parts_of_one_granule_lose_nothing() {
    for _ in 0..50 {
        let place = Place::new(SIZE);
        let layer = place.open().unwrap();
        std::thread::scope(|scope| {
            for sector in 0..SIZE / SECTOR {
                let layer = &layer;
                scope.spawn(move || {
                    layer
                        .write_at(&[200 + sector as u8; SECTOR as usize], sector * SECTOR)
                        .unwrap()
                });
            }
            scope.spawn(|| layer.flush().unwrap());
        });
        drop(layer);
        let layer = place.open().unwrap();
        let right = (0..SIZE).map(|at| 200 + (at / SECTOR) as u8);
        assert!(content(&layer).into_iter().eq(right));
    }
}

#[test]
fn a_failed_flush_is_tried_again_in_full() {
    /// Fails to synchronize when told so.
    struct Failing(Recorded, std::sync::atomic::AtomicBool);
    impl Medium for Arc<Failing> {
        fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read_exact_at(bytes, offset)
        }
        fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.0.write_all_at(bytes, offset)
        }
        fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
            self.0.punch(offset, length)
        }
        fn sync(&self) -> io::Result<()> {
            match self.1.load(Ordering::Relaxed) {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => self.0.sync(),
            }
        }
    }
    let file = Recorded::default();
    file.state.lock().unwrap().0 = vec![0; (header().data() + SIZE) as usize];
    let failing = Arc::new(Failing(file.clone(), true.into()));
    let layer = Layer::over(failing.clone(), base_file(), header(), false).unwrap();
    layer.write_at(&[7; 4096], 0).unwrap();
    assert!(layer.flush().is_err());
    failing.1.store(false, Ordering::Relaxed);
    layer.flush().unwrap();
    let after = Layer::over(file, base_file(), header(), false).unwrap();
    assert_eq!(content(&after)[..4096], [7; 4096]);
}
