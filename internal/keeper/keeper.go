//go:build linux

// Package keeper is the process that a service's ports belong to. It holds every descriptor that must survive, starts
// processes, and answers the bind and listen calls of the programs it started; what to do when is the supervisor's to say,
// over a protocol of its own.
//
// The keeper may never wait for the supervisor, for a program, or for the network: while it does, a program stands
// still in its bind(2). It decides nothing that could be decided later, and it keeps no history.
package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/berth-net/berth/internal/steer"
	"github.com/berth-net/berth/internal/sys"
)

// Config is what the keeper needs to know of the service.
type Config struct {
	Service  json.RawMessage // handed to each supervisor, not looked at
	Name     string          // for the programs' environment
	Control  *os.File        // the listening control socket, kept across supervisors
	Declared []Form          // addresses that the service named: a program may bind these below port 1024 without the right
	Log      *slog.Logger
}

// Names by which the executable knows that it is to be one of berth's processes. A shell starts none of them.
const (
	supervisorName = "berth-supervisor"
	shimName       = "berth-shim"
	relayName      = "berth-relay"
)

// Keeper is the state of the process.
type Keeper struct {
	config Config
	means  Means
	log    *slog.Logger
	done   chan int // the exit status, once

	mu         sync.Mutex // guards all below; held for a few system calls at the most
	state      json.RawMessage
	workers    map[int]*worker
	listeners  map[int]*listener
	groups     map[Form]*steer.Group
	strays     map[Form]uint64 // misled connections that have been reported
	mode       steer.Mode
	lastID     int
	greeted    bool             // the supervisor has the inventory
	missed     []Event          // signals that came while none had it
	sock       *os.File         // to the supervisor
	supervisor int              // its pid
	ending     bool             // the supervisor has said that all is over
	relays     map[int]struct{} // pids
	out        chan outgoing    // to the supervisor; nil while there is none
}

type outgoing struct {
	message
	files []*os.File
	lent  bool // the files are another process': they are closed once they are sent
}

func (m outgoing) done() {
	if m.lent {
		closeAll(m.files)
	}
}

// listener is a listening socket with the descriptor that keeps its queue alive.
type listener struct {
	Listener
	sock     *os.File
	slot     steer.Slot
	reuse    bool // the program itself asked for SO_REUSEPORT
	deferred int  // its TCP_DEFER_ACCEPT, while it is probed
	origin   int  // the generation that made it; a later one may have inherited it
}

// Run is the keeper's life: it returns the exit status when the supervisor says so.
func Run(config Config) (int, error) {
	k := &Keeper{
		config:    config,
		log:       config.Log,
		done:      make(chan int, 1),
		workers:   map[int]*worker{},
		listeners: map[int]*listener{},
		groups:    map[Form]*steer.Group{},
		strays:    map[Form]uint64{},
		relays:    map[int]struct{}{},
	}
	if err := sys.BecomeSubreaper(); err != nil {
		return 1, err
	}
	children, signals := make(chan os.Signal, 1), make(chan os.Signal, 16)
	signal.Notify(children, syscall.SIGCHLD)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(children)
	defer signal.Stop(signals)
	SurvivePipe()
	k.findMeans()
	if err := k.startSupervisor(); err != nil {
		return 1, err
	}
	defer k.closeAll()
	for {
		select {
		case status := <-k.done:
			k.outlive(children)
			return status, nil
		case <-children:
			k.reap()
		case sig := <-signals:
			k.mu.Lock()
			if ev := (Event{Signal: int(sig.(syscall.Signal))}); k.greeted {
				k.emit(ev)
			} else {
				k.missed = append(k.missed, ev)
			}
			k.mu.Unlock()
		}
	}
}

// SurvivePipe lets this process go on when nobody reads its output any more: without a handler, Go ends a process whose write to
// standard output or error meets EPIPE. The programs keep the signal's default.
func SurvivePipe() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// outlive waits for the supervisor's end, so that nothing of berth's runs on, or still has something to say, when the keeper has ended.
func (k *Keeper) outlive(signals <-chan os.Signal) {
	k.mu.Lock()
	k.ending = true
	k.mu.Unlock()
	late := time.After(5 * time.Second)
	for {
		k.reap()
		k.mu.Lock()
		pid := k.supervisor
		k.mu.Unlock()
		if pid == 0 {
			return
		}
		select {
		case <-signals:
		case <-late:
			_ = sys.Kill(pid, syscall.SIGKILL)
			return
		}
	}
}

// findMeans tries once what this process may do.
func (k *Keeper) findMeans() {
	mode, err := steer.Best()
	k.mode = mode
	k.means.Steering = mode.String()
	if err != nil {
		k.means.SteeringWhy = err.Error()
	}
	k.means.Intercept, k.means.Adoption = true, AdoptDuplicate
	if err := tryDuplicate(); err != nil {
		k.means.Adoption, k.means.AdoptionWhy = AdoptReplace, err.Error()
	}
}

// The two ways to make a program's listener part of a group.
const (
	AdoptDuplicate = "duplicate"
	AdoptReplace   = "replace"
)

// tryDuplicate duplicates a descriptor of this process' own: what forbids it there (a container's filter) forbids it
// everywhere. A program that may not be traced shows only when it binds.
func tryDuplicate() error {
	pidfd, err := sys.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	f, err := sys.PidfdGetfd(pidfd, int(pidfd.Fd()))
	if err == nil {
		f.Close()
	}
	return err
}

// emit tells the supervisor. With none there nothing is lost: Hello gives the next one the inventory, and signals wait for it.
func (k *Keeper) emit(ev Event) {
	body, err := json.Marshal(ev)
	if err == nil {
		k.send(outgoing{message: message{Op: "event", Body: body}})
	}
}

// send never blocks: a supervisor that lets 1,024 messages pile up is cut off, ends, and starts over from the inventory.
func (k *Keeper) send(m outgoing) {
	if k.out == nil {
		m.done()
		return
	}
	select {
	case k.out <- m:
	default:
		m.done()
		k.cutOff()
	}
}

// cutOff ends what is said to the supervisor: it meets an end of file, ends, and another starts.
func (k *Keeper) cutOff() {
	if k.out != nil {
		close(k.out)
		k.out, k.greeted = nil, false
		_ = sys.StopTalking(k.sock)
	}
}

func (k *Keeper) startSupervisor() error {
	ours, theirs, err := sys.SeqpacketPair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{supervisorName}, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{0, 1, 2, theirs.Fd()},
		// A terminal's signals are for the keeper.
		Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		ours.Close()
		return fmt.Errorf("start the supervisor: %w", err)
	}
	out := make(chan outgoing, 1024)
	k.mu.Lock()
	k.supervisor, k.out, k.sock = pid, out, ours
	k.mu.Unlock()
	go func() {
		defer ours.Close()
		for m := range out {
			data, err := json.Marshal(m.message)
			if err == nil {
				err = sys.SendMessage(ours, data, m.files...)
			}
			m.done()
			if err != nil {
				k.mu.Lock()
				if k.out == out {
					k.cutOff()
				}
				k.mu.Unlock()
				break
			}
		}
		for m := range out {
			m.done()
		}
	}()
	go k.serve(ours, out)
	return nil
}

// serve answers one supervisor's requests until it is gone.
func (k *Keeper) serve(sock *os.File, out chan outgoing) {
	buf := make([]byte, maxMessage)
	for {
		n, files, err := sys.ReceiveMessage(sock, buf)
		if err != nil {
			break
		}
		closeAll(files) // a supervisor sends none
		var m message
		if err := json.Unmarshal(buf[:n], &m); err != nil {
			k.log.Error("the supervisor sent what is no message", "err", err)
			break
		}
		if m.Op == opStart {
			go k.respond(m, out) // a shim takes milliseconds
		} else {
			k.respond(m, out)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.out == out {
		k.cutOff()
	}
}

// respond carries out one request and answers it.
func (k *Keeper) respond(m message, out chan outgoing) {
	result, files, err := k.answerRequest(m)
	r := outgoing{message: message{ID: m.ID}, files: files, lent: m.Op == opDuplicate || m.Op == opStart}
	if err == nil {
		r.Body, err = json.Marshal(result)
	}
	if err == nil && len(r.Body) > maxMessage-1024 {
		err = fmt.Errorf("%s: the answer of %d bytes is too large", m.Op, len(r.Body))
		r.Body = nil
	}
	if err != nil {
		r.Error = &Error{Text: err.Error()}
		var errno syscall.Errno
		if errors.As(err, &errno) {
			r.Error.Errno = errno
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.out != out {
		r.done()
		return
	}
	k.send(r)
	if m.Op == opHello {
		k.greeted = true
		for _, ev := range k.missed {
			k.emit(ev)
		}
		k.missed = nil
	}
}

func (k *Keeper) answerRequest(m message) (any, []*os.File, error) {
	decode := func(to any) error {
		if err := json.Unmarshal(m.Body, to); err != nil {
			return fmt.Errorf("%s: %w", m.Op, err)
		}
		return nil
	}
	switch m.Op {
	case opHello:
		inv, files := k.inventory()
		return inv, files, nil
	case opHold:
		var h Hold
		if err := decode(&h); err != nil {
			return nil, nil, err
		}
		l, err := k.hold(h.Form)
		return l, nil, err
	case opStart:
		var s Start
		if err := decode(&s); err != nil {
			return nil, nil, err
		}
		return k.start(s)
	case opProbe:
		var p Probe
		if err := decode(&p); err != nil {
			return nil, nil, err
		}
		return nil, nil, k.probe(p)
	case opQueues:
		return k.queues(), nil, nil
	case opListeners:
		return k.list(), nil, nil
	case opRelay:
		var r Relay
		if err := decode(&r); err != nil {
			return nil, nil, err
		}
		return nil, nil, k.relay(r)
	case opDuplicate:
		var at [2]int
		if err := decode(&at); err != nil {
			return nil, nil, err
		}
		f, err := duplicate(at[0], at[1])
		if err != nil {
			return nil, nil, err
		}
		return nil, []*os.File{f}, nil
	case opState:
		k.mu.Lock()
		k.state = append(json.RawMessage(nil), m.Body...)
		k.mu.Unlock()
		return nil, nil, nil
	}
	var n int
	if err := decode(&n); err != nil {
		return nil, nil, err
	}
	switch m.Op {
	case opSteer:
		return nil, nil, k.steer(n)
	case opRelease:
		return k.release(n), nil, nil
	case opRefuse:
		return nil, nil, k.refuse(n)
	case opClose:
		return nil, nil, k.closeOne(n)
	case opExit:
		k.done <- n
		return nil, nil, nil
	}
	return nil, nil, fmt.Errorf("unknown request %q: this keeper speaks version %d", m.Op, Version)
}

func duplicate(pid, fd int) (*os.File, error) {
	pidfd, err := sys.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	defer pidfd.Close()
	return sys.PidfdGetfd(pidfd, fd)
}

func (k *Keeper) inventory() (Inventory, []*os.File) {
	k.mu.Lock()
	defer k.mu.Unlock()
	inv := Inventory{Version: Version, Config: k.config.Service, State: k.state, Means: k.means}
	files := []*os.File{k.config.Control}
	for _, w := range k.workers {
		inv.Workers = append(inv.Workers, w.Worker)
		files = append(files, w.outputs...)
	}
	for _, l := range k.listeners {
		inv.Listeners = append(inv.Listeners, l.Listener)
	}
	return inv, files
}

// reap collects ended children: workers, their orphans, relays and the supervisor, which is started again.
func (k *Keeper) reap() {
	for {
		pid, status, err := sys.Reap()
		if err != nil || pid == 0 {
			return
		}
		k.mu.Lock()
		switch {
		case pid == k.supervisor:
			k.supervisor = 0
			if k.ending {
				break
			}
			if k.state == nil {
				// It could not even begin, and has said why.
				select {
				case k.done <- 1:
				default:
				}
				break
			}
			k.log.Error("the supervisor ended and is started again", "status", Describe(status))
			k.startAgain()
		default:
			delete(k.relays, pid)
			for _, w := range k.workers {
				if w.PID == pid && !w.Exited {
					w.Exited, w.Status = true, &status
					k.emit(Event{Exited: &w.Worker})
					if w.notify == nil {
						w.Gone = true
						k.emit(Event{Gone: w.Generation})
					}
				}
			}
		}
		k.mu.Unlock()
	}
}

// startAgain starts a supervisor after a pause: one that dies at once would otherwise take a core.
func (k *Keeper) startAgain() {
	time.AfterFunc(50*time.Millisecond, func() {
		if err := k.startSupervisor(); err != nil {
			k.log.Error("no supervisor", "err", err)
			k.startAgain()
		}
	})
}

// Describe says how a process ended.
func Describe(s syscall.WaitStatus) string {
	if s.Signaled() {
		return fmt.Sprintf("killed by signal %d (%s)", s.Signal(), s.Signal())
	}
	return fmt.Sprintf("exit status %d", s.ExitStatus())
}

func (k *Keeper) closeAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, w := range k.workers {
		k.forget(w)
	}
	for pid := range k.relays {
		_ = sys.Kill(pid, syscall.SIGKILL)
	}
	for _, l := range k.listeners {
		l.sock.Close()
	}
	for _, g := range k.groups {
		g.Close()
	}
	if k.out != nil {
		close(k.out)
		k.out = nil
	}
}
