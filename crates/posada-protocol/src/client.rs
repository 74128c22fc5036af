//! The host's side.

use crate::archive::{self, Trust};
use crate::frame::{Channel, Frame, FrameError, MOST, read_frame, write_data, write_message};
use crate::message::{Answer, Ending, Exec, Failure, Hello, NEWEST, OLDEST, Order, Request, Size, Status};
use crate::statistics::Statistics;
use crate::{PORT, WINDOW};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of the longest answer of a vsock's socket: `OK 4294967295\n`.
const LINE: usize = 14;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vsock's socket cannot be reached.
    #[error("cannot connect to the VM's vsock: {0}")]
    Connect(io::Error),
    /// Nobody listens in the guest.
    #[error("no agent answers in the guest: is posada-agent running there?")]
    NoAgent,
    /// No version that both speak.
    #[error(
        "the agent in the guest (Posada {}) speaks the protocol versions {} to {}, this Posada {OLDEST} to {NEWEST}",
        .0.posada, .0.oldest, .0.newest
    )]
    Version(Hello),
    /// It said something that it must not say.
    #[error("the agent breaks the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// It has gone.
    #[error("the connection to the agent has ended")]
    Gone,
    /// It refuses.
    #[error("{message}")]
    Failed {
        /// For programs.
        why: Failure,
        /// The agent's words, without control characters.
        message: String,
    },
    /// What is copied cannot be read or written on this host.
    #[error("the copy fails here: {0}")]
    Local(io::Error),
    /// More output than the caller wanted to hold.
    #[error("the program wrote more than {0} bytes")]
    TooMuch(usize),
}

/// A connection to an agent.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    version: u32,
}

impl Client {
    /// Connects to the agent of the VM whose `--vsock` has this path. Whatever is answered at once must come within
    /// `patience`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn connect(vsock: &Path, patience: Duration) -> Result<Self, Error> {
        Self::through(UnixStream::connect(vsock).map_err(Error::Connect)?, patience)
    }

    /// The same by a connection to that socket.
    ///
    /// # Errors
    /// [`Error`].
    pub fn through(mut stream: UnixStream, patience: Duration) -> Result<Self, Error> {
        stream.set_read_timeout(Some(patience)).map_err(Error::Connect)?;
        writeln!(stream, "CONNECT {PORT}").map_err(Error::Connect)?;
        let mut line = Vec::new();
        // Byte by byte: what follows is the agent's.
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            let count = stream.read(&mut byte).map_err(Error::Connect)?;
            if count == 0 || line.len() == LINE {
                return Err(Error::NoAgent);
            }
            line.push(byte[0]);
        }
        if !line.starts_with(b"OK ") {
            return Err(Error::NoAgent);
        }
        Self::over(stream, patience)
    }

    /// Begins to speak with the agent at the other end of `stream`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn over(mut stream: UnixStream, patience: Duration) -> Result<Self, Error> {
        stream.set_read_timeout(Some(patience)).map_err(Error::Connect)?;
        stream.set_write_timeout(Some(patience)).map_err(Error::Connect)?;
        let ours = Hello::ours();
        write_message(&mut stream, &ours).map_err(FrameError::from)?;
        let theirs: Hello = next(&mut stream)?.message()?;
        let Some(version) = ours.agree(&theirs) else {
            return Err(Error::Version(Hello {
                posada: plain(&theirs.posada),
                ..theirs
            }));
        };
        Ok(Self { stream, version })
    }

    /// The version that both speak.
    pub fn version(&self) -> u32 {
        self.version
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, Error> {
        write_message(&mut self.stream, request).map_err(FrameError::from)?;
        answer(&next(&mut self.stream)?)
    }

    fn order(mut self, request: &Request) -> Result<(), Error> {
        match self.ask(request)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends the guest as its administrator would; it takes a while after this. The guest may end its agent before that can
    /// answer: who wants to know more looks at the VM.
    ///
    /// # Errors
    /// [`Error`].
    pub fn shut_down(self, how: Ending) -> Result<(), Error> {
        match self.order(&Request::Shutdown { how }) {
            Err(Error::Gone) => Ok(()),
            other => other,
        }
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    /// [`Error`].
    pub fn set_time(self, time: SystemTime) -> Result<(), Error> {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = since.as_nanos().try_into().unwrap_or(u64::MAX);
        self.order(&Request::SetTime { nanoseconds })
    }

    /// Sets the guest's host name.
    ///
    /// # Errors
    /// [`Error`].
    pub fn set_hostname(self, name: &str) -> Result<(), Error> {
        self.order(&Request::SetHostname { name: name.into() })
    }

    /// Lets the owners of these keys (lines of `authorized_keys`) log in as `user` by ssh.
    ///
    /// # Errors
    /// [`Error`].
    pub fn authorize_keys(self, user: &str, keys: &[String]) -> Result<(), Error> {
        self.order(&Request::AuthorizeKeys {
            user: user.into(),
            keys: keys.to_vec(),
        })
    }

    /// Has the first `online` CPUs work and the others not; gives the numbers of those that are there and those that work.
    ///
    /// # Errors
    /// [`Error`].
    pub fn set_cpus(mut self, online: u32) -> Result<(Vec<u32>, Vec<u32>), Error> {
        match self.ask(&Request::SetCpus { online })? {
            Answer::Cpus { present, online } => Ok((present, online)),
            other => Err(unexpected(&other)),
        }
    }

    /// How the guest is, with so many of its processes that use most.
    ///
    /// # Errors
    /// [`Error`].
    pub fn statistics(mut self, processes: u32) -> Result<Statistics, Error> {
        match self.ask(&Request::Statistics { processes })? {
            Answer::Statistics(statistics) => Ok(*statistics),
            other => Err(unexpected(&other)),
        }
    }

    /// Has file systems on disks write all that they hold back, and stops writes to them: until [`Frozen::thaw`], until the
    /// guard goes, or for so many seconds.
    ///
    /// # Errors
    /// [`Error`].
    pub fn freeze(mut self, seconds: u32) -> Result<Frozen, Error> {
        match self.ask(&Request::Freeze { seconds })? {
            Answer::Done => Ok(Frozen(self)),
            other => Err(unexpected(&other)),
        }
    }

    /// Writes a file or folder of the guest to `archive`, in the tar format. The archive is the guest's: who unpacks it
    /// must not believe its paths, nor its length.
    ///
    /// # Errors
    /// [`Error`].
    pub fn get(mut self, path: &str, archive: &mut impl Write) -> Result<(), Error> {
        let mut from_agent = self.download(path)?;
        let copied = io::copy(&mut from_agent, archive).map(drop);
        from_agent.finish(copied)
    }

    /// Copies a file or folder of the guest into the directory `into` of the host, which is there. All of it is the caller's
    /// then, has ordinary rights, and at most `most` bytes, with 512 for each file.
    ///
    /// # Errors
    /// [`Error`]; some of it may be there then.
    pub fn copy_out(mut self, path: &str, into: &Path, most: u64) -> Result<(), Error> {
        let mut from_agent = self.download(path)?;
        let unpacked = archive::unpack(&mut from_agent, into, Trust::None { most });
        from_agent.finish(unpacked)
    }

    fn download(&mut self, path: &str) -> Result<FromAgent<'_>, Error> {
        let request = Request::Get { path: path.into() };
        write_message(&mut self.stream, &request).map_err(FrameError::from)?;
        Ok(FromAgent {
            stream: &mut self.stream,
            bytes: Vec::new(),
            at: 0,
            end: None,
        })
    }

    /// Unpacks `archive`, in the tar format, in a directory of the guest. There is no time limit.
    ///
    /// # Errors
    /// [`Error`]; some of it may be there then.
    pub fn put(self, directory: &str, archive: &mut impl Read) -> Result<(), Error> {
        self.upload(directory, |to_agent| io::copy(archive, to_agent).map(drop))
    }

    /// Copies a file or folder of the host into a directory of the guest, with owners and rights. There is no time limit.
    ///
    /// # Errors
    /// [`Error`]; some of it may be there then.
    pub fn copy_in(self, path: &Path, directory: &str) -> Result<(), Error> {
        self.upload(directory, |to_agent| archive::pack(path, to_agent))
    }

    fn upload(mut self, directory: &str, fill: impl FnOnce(&mut ToAgent<'_>) -> io::Result<()>) -> Result<(), Error> {
        let request = Request::Put {
            directory: directory.into(),
        };
        write_message(&mut self.stream, &request).map_err(FrameError::from)?;
        self.stream.set_read_timeout(None).map_err(Error::Connect)?;
        self.stream.set_write_timeout(None).map_err(Error::Connect)?;
        let mut reader = self.stream.try_clone().map_err(Error::Connect)?;
        let answered = AtomicBool::new(false);
        thread::scope(|scope| {
            // The agent may refuse before it has all.
            let answer = scope.spawn(|| {
                let answer = next(&mut reader).and_then(|frame| answer(&frame));
                answered.store(true, Ordering::Release);
                answer
            });
            let mut to_agent = ToAgent {
                stream: &mut self.stream,
                answered: &answered,
                gone: false,
            };
            let sent = fill(&mut to_agent).and_then(|()| to_agent.end());
            let gone = to_agent.gone;
            if sent.is_err() {
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            let answer = answer.join().expect("it does not panic");
            // What it says is a better reason than that it takes no more.
            match (answer, sent) {
                (Err(refused @ Error::Failed { .. }), _) => Err(refused),
                (_, Err(_)) if gone => Err(Error::Gone),
                (_, Err(error)) => Err(Error::Local(error)),
                (Ok(Answer::Done), Ok(())) => Ok(()),
                (Ok(other), Ok(())) => Err(unexpected(&other)),
                (Err(error), Ok(())) => Err(error),
            }
        })
    }

    /// Starts a program. From then on nothing has a time limit.
    ///
    /// # Errors
    /// [`Error::Failed`] when it cannot be started, and others.
    pub fn exec(mut self, exec: &Exec) -> Result<(Input, Output), Error> {
        let pid = match self.ask(&Request::Exec(exec.clone()))? {
            Answer::Started { pid } => pid,
            other => return Err(unexpected(&other)),
        };
        self.stream.set_read_timeout(None).map_err(Error::Connect)?;
        self.stream.set_write_timeout(None).map_err(Error::Connect)?;
        let reader = self.stream.try_clone().map_err(Error::Connect)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                stream: self.stream,
                room: WINDOW,
                over: false,
            }),
            changed: Condvar::new(),
        });
        let output = Output {
            stream: reader,
            shared: Arc::clone(&shared),
            pid,
        };
        Ok((Input(shared), output))
    }

    /// Runs a program to its end with this input, and holds at most `most` bytes of its output and errors.
    ///
    /// # Errors
    /// [`Error`]. The program gets a SIGHUP if it runs.
    pub fn run(self, exec: &Exec, input: &[u8], most: usize) -> Result<Finished, Error> {
        let exec = Exec {
            input: !input.is_empty(),
            ..exec.clone()
        };
        let (writer, mut output) = self.exec(&exec)?;
        thread::scope(|scope| {
            if exec.input {
                scope.spawn(move || {
                    // A program need not read its input.
                    let _ = writer.write(input).and_then(|()| writer.close());
                });
            }
            let finished = output.collect(most);
            // Ends the writer, too.
            output.hang_up();
            finished
        })
    }
}

/// An archive on its way to the agent.
struct ToAgent<'a> {
    stream: &'a mut UnixStream,
    /// The agent has said something: it wants no more.
    answered: &'a AtomicBool,
    gone: bool,
}

impl ToAgent<'_> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sent = if self.answered.load(Ordering::Acquire) {
            Err(io::ErrorKind::BrokenPipe.into())
        } else {
            write_data(&mut self.stream, Channel::Input, bytes)
        };
        self.gone |= sent.is_err();
        sent
    }

    fn end(&mut self) -> io::Result<()> {
        self.send(&[])
    }
}

impl Write for ToAgent<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(WINDOW);
        if count > 0 {
            self.send(&bytes[..count])?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An archive on its way from the agent.
struct FromAgent<'a> {
    stream: &'a mut UnixStream,
    bytes: Vec<u8>,
    at: usize,
    /// What has ended it.
    end: Option<Result<(), Error>>,
}

impl FromAgent<'_> {
    fn next_bytes(&mut self) -> Result<Option<Vec<u8>>, Error> {
        match next(self.stream)? {
            Frame::Data(Channel::Output, bytes) => Ok(Some(bytes)),
            frame => match answer(&frame)? {
                Answer::Done => Ok(None),
                other => Err(unexpected(&other)),
            },
        }
    }

    /// How it went, if what was done with it went so.
    fn finish(self, done: io::Result<()>) -> Result<(), Error> {
        match (self.end, done) {
            (Some(Err(error)), _) => Err(error),
            (_, Err(error)) => Err(Error::Local(error)),
            (Some(Ok(())), Ok(())) => Ok(()),
            (None, Ok(())) => Err(Error::Gone),
        }
    }
}

impl Read for FromAgent<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.at == self.bytes.len() {
            match &self.end {
                Some(Ok(())) => return Ok(0),
                Some(Err(_)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                None => {}
            }
            match self.next_bytes() {
                Ok(Some(bytes)) => (self.bytes, self.at) = (bytes, 0),
                Ok(None) => self.end = Some(Ok(())),
                Err(error) => self.end = Some(Err(error)),
            }
        }
        let count = to.len().min(self.bytes.len() - self.at);
        to[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// A guest whose file systems stand still.
#[derive(Debug)]
pub struct Frozen(Client);

impl Frozen {
    /// Lets them go on.
    ///
    /// # Errors
    /// [`Error`], also when they went on before, as the time was over.
    pub fn thaw(mut self) -> Result<(), Error> {
        let stream = &mut self.0.stream;
        // An agent for which the time was over has said so, and gone.
        let _ = write_message(stream, &Order::Thaw);
        match answer(&next(stream)?)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// How a program that was run to its end has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// How.
    pub status: Status,
    /// Standard output.
    pub output: Vec<u8>,
    /// Standard error.
    pub errors: Vec<u8>,
}

struct State {
    stream: UnixStream,
    /// Bytes of input that may be sent.
    room: usize,
    /// No more can be sent.
    over: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }
}

/// What goes to a program. Its copies may be used from several threads.
#[derive(Clone)]
pub struct Input(Arc<Shared>);

impl Input {
    /// Sends input. It waits until the program takes it, which it learns when somebody reads from [`Output`].
    ///
    /// # Errors
    /// [`Error::Gone`] when the program or the connection has ended.
    pub fn write(&self, mut bytes: &[u8]) -> Result<(), Error> {
        let mut state = self.0.state();
        while !bytes.is_empty() {
            while state.room == 0 && !state.over {
                state = self.0.changed.wait(state).expect("nobody panics with it");
            }
            if state.over {
                return Err(Error::Gone);
            }
            let (now, later) = bytes.split_at(bytes.len().min(state.room));
            write_data(&mut state.stream, Channel::Input, now).map_err(|_| Error::Gone)?;
            state.room -= now.len();
            bytes = later;
        }
        Ok(())
    }

    /// Ends the input. On a terminal that does nothing: send it what its user would type.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn close(&self) -> Result<(), Error> {
        write_data(&mut self.0.state().stream, Channel::Input, &[]).map_err(|_| Error::Gone)
    }

    /// Sends a signal to the program's process group.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn signal(&self, number: i32) -> Result<(), Error> {
        self.order(&Order::Signal { number })
    }

    /// The terminal has another size.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn resize(&self, size: Size) -> Result<(), Error> {
        self.order(&Order::Resize(size))
    }

    fn order(&self, order: &Order) -> Result<(), Error> {
        write_message(&mut self.0.state().stream, order).map_err(|_| Error::Gone)
    }
}

/// What comes from a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Standard output.
    Output(Vec<u8>),
    /// Standard error.
    Errors(Vec<u8>),
    /// It has ended; nothing follows.
    Ended(Status),
}

/// What comes from a program. Dropped before the end it ends the connection.
pub struct Output {
    stream: UnixStream,
    shared: Arc<Shared>,
    pid: u32,
}

impl Output {
    /// The program's process id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for what comes next.
    ///
    /// # Errors
    /// [`Error`]; nothing follows.
    pub fn next_event(&mut self) -> Result<Event, Error> {
        loop {
            let frame = next(&mut self.stream)?;
            match frame {
                Frame::Data(Channel::Output, bytes) => return Ok(Event::Output(bytes)),
                Frame::Data(Channel::Errors, bytes) => return Ok(Event::Errors(bytes)),
                _ => {}
            }
            match answer(&frame)? {
                Answer::Taken { bytes } => {
                    let mut state = self.shared.state();
                    // An agent that lies gets no more than the window at a time.
                    state.room = state.room.saturating_add(bytes as usize).min(WINDOW);
                    self.shared.changed.notify_all();
                }
                Answer::Ended { status } => return Ok(Event::Ended(status)),
                other => return Err(unexpected(&other)),
            }
        }
    }

    fn collect(&mut self, most: usize) -> Result<Finished, Error> {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let status = loop {
            match self.next_event()? {
                Event::Output(bytes) => output.extend(bytes),
                Event::Errors(bytes) => errors.extend(bytes),
                Event::Ended(status) => break status,
            }
            if output.len() + errors.len() > most {
                return Err(Error::TooMuch(most));
            }
        };
        Ok(Finished { status, output, errors })
    }

    fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        self.shared.state().over = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.hang_up();
    }
}

fn next(stream: &mut UnixStream) -> Result<Frame, Error> {
    read_frame(stream)?.ok_or(Error::Gone)
}

fn answer(frame: &Frame) -> Result<Answer, Error> {
    match frame.message()? {
        Answer::Failed { why, message } => Err(Error::Failed {
            why,
            message: plain(&message),
        }),
        other => Ok(other),
    }
}

fn unexpected(answer: &Answer) -> Error {
    let text = format!("{answer:?} here");
    FrameError::Message(serde::de::Error::custom(plain(&text))).into()
}

/// A guest's words for a terminal of the host: one line of no great length.
fn plain(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(500).collect()
}

// A frame takes what may be on its way.
const _: () = assert!(WINDOW <= MOST);

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// An agent that says `bytes`, whatever it hears, and then waits for the end.
    fn agent(bytes: Vec<u8>) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut reader = theirs.try_clone().unwrap();
            let drain = thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
            let _ = theirs.write_all(&bytes);
            let _ = drain.join();
        });
        ours
    }

    fn says(messages: &[&str]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_message(&mut bytes, &Hello::ours()).unwrap();
        for message in messages {
            write_message(&mut bytes, &serde_json::from_str::<serde_json::Value>(message).unwrap()).unwrap();
        }
        bytes
    }

    fn run(bytes: Vec<u8>) -> Result<Finished, Error> {
        let exec = Exec {
            command: vec!["x".into()],
            ..Exec::default()
        };
        Client::over(agent(bytes), SOON)?.run(&exec, &[1; 3 * WINDOW], 1000)
    }

    #[test]
    fn an_agent_of_another_time_is_refused() {
        let mut bytes = Vec::new();
        let future = Hello {
            posada: "9.9\x1b[2J".into(),
            newest: 9,
            oldest: 9,
        };
        write_message(&mut bytes, &future).unwrap();
        let error = run(bytes).unwrap_err().to_string();
        assert_eq!(
            error,
            "the agent in the guest (Posada 9.9[2J) speaks the protocol versions 9 to 9, this Posada 1 to 1"
        );
    }

    #[test]
    fn an_agent_that_never_answers_is_given_up() {
        let error = Client::over(agent(vec![]), Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::Protocol(FrameError::Io(_))), "{error}");
        let client = Client::over(agent(says(&[])), Duration::from_millis(50)).unwrap();
        assert!(client.run(&Exec::default(), &[], 0).is_err());
    }

    #[test]
    fn an_agent_may_end_with_its_guest() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guest = thread::spawn(move || {
            let mut theirs = theirs;
            theirs.write_all(&says(&[])).unwrap();
            next(&mut theirs).unwrap();
            next(&mut theirs).unwrap().message::<Request>().unwrap()
        });
        Client::over(ours, SOON).unwrap().shut_down(Ending::PowerOff).unwrap();
        let how = Ending::PowerOff;
        assert_eq!(guest.join().unwrap(), Request::Shutdown { how });
        let error = Client::over(agent(says(&["7"])), SOON)
            .unwrap()
            .shut_down(how)
            .unwrap_err();
        assert!(matches!(error, Error::Protocol(_)), "{error}");
    }

    #[test]
    fn an_agent_that_says_nonsense_or_too_much_costs_little() {
        let started = r#"{"answer":"started","pid":1}"#;
        let ended = r#"{"answer":"ended","status":{"exited":3}}"#;
        let taken = r#"{"answer":"taken","bytes":4294967295}"#;
        let finished = run(says(&[started, taken, taken, ended])).unwrap();
        assert_eq!(finished.status, Status::Exited(3));
        let failed = r#"{"answer":"failed","why":"not-found","message":"no\u001b[31m such"}"#;
        let error = run(says(&[failed])).unwrap_err();
        assert!(matches!(&error, Error::Failed { why: Failure::NotFound, message } if message == "no[31m such"));
        for (bytes, wanted) in [
            (says(&[ended]), "breaks the protocol"),
            (says(&[started, started]), "breaks the protocol"),
            (says(&[started, "7"]), "breaks the protocol"),
            ([says(&[started]), vec![255; 5]].concat(), "longer than the most"),
        ] {
            let error = run(bytes).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        let mut flood = says(&[started]);
        for _ in 0..100 {
            write_data(&mut flood, Channel::Output, &[b'x'; 1 << 16]).unwrap();
        }
        assert!(matches!(run(flood), Err(Error::TooMuch(1000))));
    }
}
