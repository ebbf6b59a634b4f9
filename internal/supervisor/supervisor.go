//go:build linux

// Package supervisor decides what becomes of a service's generations: it starts them by way of the keeper, finds out when
// they are ready, steers, drains, rolls back, and keeps the ledger.
//
// What happens is an [Event]; what follows from it is said by [State.Apply], which does nothing itself; the
// [Supervisor] carries it out. It keeps nothing that it could not take up again from the keeper's inventory.
package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/berth-net/berth/internal/drain"
	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/sockdiag"
)

// Supervisor carries out what the model says.
type Supervisor struct {
	config    Config
	inventory keeper.Inventory
	keeper    *keeper.Client
	control   net.Listener
	diag      *sockdiag.Conn
	log       *slog.Logger

	events chan Event    // from tasks
	asked  chan func()   // from Status, Restart and Stop, run in the loop
	done   chan struct{} // closed when the service has ended

	// All below belongs to Run's goroutine.
	state     State
	runs      map[int]*run
	listeners map[int]keeper.Listener
	tellers   map[uint64]*waiter
	status    int
}

// run is what the supervisor has of one generation besides the model's view of it.
type run struct {
	processes
	cgroupWhy   string // why it has no cgroup
	order       *drain.Order
	orderWhy    string // why it has none
	notify      *notifySocket
	tail        *tail
	listening   chan []keeper.Listener // to its trial
	cancel      context.CancelFunc     // of its trial or drain
	left        int                    // connections with something in flight when its drain ended
	cut         func() int             // ends watchCut
	refusal     string                 // why it was last refused a bind or listen, and of what
	refusedForm keeper.Form
	unheld      map[int]bool  // listeners that no process had at the last look
	begun       chan struct{} // closed when the keeper has answered its start
}

// waiter is somebody who waits for a request's outcome.
type waiter struct {
	steered chan Entry
	ended   chan Entry
}

// New greets the keeper at the other end of the socket.
func New(sock *os.File) (*Supervisor, error) {
	client := keeper.NewClient(sock)
	inv, files, err := client.Hello()
	if err != nil {
		return nil, err
	}
	s := &Supervisor{
		inventory: inv,
		keeper:    client,
		events:    make(chan Event, 64),
		asked:     make(chan func()),
		done:      make(chan struct{}),
		runs:      map[int]*run{},
		listeners: map[int]keeper.Listener{},
		tellers:   map[uint64]*waiter{},
	}
	if err := json.Unmarshal(inv.Config, &s.config); err != nil {
		return nil, fmt.Errorf("read the service's configuration: %w", err)
	}
	s.log = NewLogger(s.config.Log)
	if s.diag, err = sockdiag.Open(); err != nil {
		return nil, err
	}
	if s.control, err = net.FileListener(files[0]); err != nil {
		return nil, fmt.Errorf("take the control socket: %w", err)
	}
	// The socket's file is the keeper's to remove.
	s.control.(*net.UnixListener).SetUnlinkOnClose(false)
	files[0].Close()
	s.recover(files[1:])
	return s, nil
}

// NewLogger writes berth's own log to standard error, as text or as JSON.
func NewLogger(format string) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, nil))
	}
	return slog.New(&textHandler{})
}

// Control is the socket on which the service is controlled.
func (s *Supervisor) Control() net.Listener { return s.control }

// Config is the service's configuration.
func (s *Supervisor) Config() Config { return s.config }

func (s *Supervisor) newRun(generation int) *run {
	r := &run{
		processes: processes{generation: generation, keeper: os.Getppid()},
		tail:      &tail{},
		listening: make(chan []keeper.Listener, 1),
		cancel:    func() {},
		begun:     make(chan struct{}),
		unheld:    map[int]bool{},
	}
	s.runs[generation] = r
	return r
}

// post hands an event to the loop; tasks call it, and never the loop itself while the channel could be full.
func (s *Supervisor) post(ev Event) {
	ev.At = time.Now()
	go func() {
		select {
		case s.events <- ev:
		case <-s.done:
		}
	}()
}

// Run is the supervisor's life; it returns when the service has ended or the keeper is gone.
func (s *Supervisor) Run() error {
	if s.inventory.State == nil {
		if err := s.open(); err != nil {
			_ = s.keeper.Exit(1)
			return err
		}
		s.apply(Event{Kind: Requested, At: time.Now(), Request: Request{Cause: ByStart}})
	}
	tidy := time.NewTicker(time.Second)
	defer tidy.Stop()
	for {
		select {
		case <-tidy.C:
			s.tidy()
		case ev, ok := <-s.keeper.Events():
			if !ok {
				return errors.New("the keeper is gone")
			}
			s.heard(ev)
		case ev := <-s.events:
			s.apply(ev)
		case f := <-s.asked:
			f()
		}
		if s.state.Finished {
			close(s.done)
			return nil
		}
	}
}

// Failed reports whether the service ended because its first start failed.
func (s *Supervisor) Failed() bool { return s.status != 0 }

// Finish tells the keeper to end with the service's exit status. It is the last thing said.
func (s *Supervisor) Finish() error {
	if path, err := serviceCgroup(s.config.Name, os.Getppid()); err == nil {
		if err := removeCgroup(path); err != nil {
			s.log.Error("a cgroup stays behind", "path", path, "err", err)
		}
	}
	return s.keeper.Exit(s.status)
}

// open opens the ports, before anything is started.
func (s *Supervisor) open() error {
	for _, a := range s.config.Listen {
		l, err := s.keeper.Hold(keeper.Hold{Form: a.Form})
		if err != nil {
			return s.explainHold(a.Form, err)
		}
		s.listeners[l.ID] = l
		s.log.Info("listening", "address", a.Form.String())
	}
	return nil
}

func (s *Supervisor) apply(ev Event) {
	if r := s.runs[ev.Generation]; r != nil && ev.Kind == Started {
		r.pid = ev.PID
	}
	acts := s.state.Apply(ev)
	if ev.Kind == Exited || ev.Kind == Gone || ev.Kind == StartFailed || ev.Kind == NotReady || ev.Kind == SteerFailed || ev.Kind == StopWanted {
		s.log.Debug(string(ev.Kind), "generation", ev.Generation, "reason", ev.Reason)
	}
	if blob, err := json.Marshal(s.state.bounded()); err == nil {
		if err := s.keeper.State(blob); err != nil {
			s.log.Error("the state could not be stored with the keeper", "err", err)
		}
	}
	for _, a := range acts {
		s.carryOut(a)
	}
}

// heard takes what the keeper tells.
func (s *Supervisor) heard(ev keeper.Event) {
	switch {
	case ev.Listening != nil:
		l := *ev.Listening
		s.refresh()
		s.log.Info("listening", "generation", l.Generation, "address", l.Form.String())
		if r := s.runs[l.Generation]; r != nil {
			s.tellTrial(r)
		}
	case ev.Refused != nil:
		s.refused(*ev.Refused)
	case ev.Exited != nil:
		st := *ev.Exited.Status
		failure := !st.Exited() || st.ExitStatus() != 0
		if g := s.state.generation(ev.Exited.Generation); g != nil && failure && (g.Phase == Starting || g.Phase == Serving) {
			s.log.Error("the program ended", "generation", g.Number, "status", keeper.Describe(st))
		}
		reason := keeper.Describe(st)
		if r := s.runs[ev.Exited.Generation]; r != nil && r.refusal != "" {
			reason += "; " + r.refusal
		}
		s.apply(Event{Kind: Exited, At: time.Now(), Generation: ev.Exited.Generation, Reason: reason, Failure: failure})
	case ev.Gone != 0:
		s.gone(s.runs[ev.Gone])
	case ev.Signal == int(syscall.SIGHUP):
		s.apply(Event{Kind: Requested, At: time.Now(), Request: Request{Cause: ByRestart}})
	case ev.Signal != 0:
		s.apply(Event{Kind: StopWanted, At: time.Now()})
	}
}

// gone takes the end of a generation. Without interception the keeper can tell only the end of its first process.
func (s *Supervisor) gone(r *run) {
	if r == nil {
		return
	}
	if !s.inventory.Means.Intercept {
		if pids, err := r.List(); err == nil && len(pids) > 0 {
			time.AfterFunc(20*time.Millisecond, func() { _ = s.ask(context.Background(), func() { s.gone(s.runs[r.generation]) }) })
			return
		}
	}
	r.cancel()
	s.apply(Event{Kind: Gone, At: time.Now(), Generation: r.generation})
}

func (s *Supervisor) refused(f keeper.Refused) {
	r := s.runs[f.Generation]
	if r == nil {
		return
	}
	if !f.Fatal && r.refusedForm == f.Form {
		return // it tries again and again
	}
	r.refusal, r.refusedForm = f.Reason, f.Form
	if !f.Fatal && f.Reason == keeper.InUse {
		r.refusal = fmt.Sprintf("it could not bind %s: the address is in use%s", f.Form, s.holder(f.Form))
	}
	s.log.Warn("refused a bind or listen", "generation", f.Generation, "address", f.Form.String(), "reason", r.refusal)
	if f.Fatal {
		s.apply(Event{Kind: NotReady, At: time.Now(), Generation: f.Generation, Reason: r.refusal})
	}
}

// carryOut does what the model says, at once if it takes a few system calls, else in a task that posts its outcome.
func (s *Supervisor) carryOut(a Action) {
	r := s.runs[a.Generation]
	if r == nil && slices.Contains([]ActionKind{DoProbe, DoSteer, DoDrain, DoSignal, DoKill, DoRelease}, a.Kind) {
		s.log.Error("nothing is known of a generation any more", "generation", a.Generation, "wanted", a.Kind)
		return
	}
	switch a.Kind {
	case DoStart:
		s.start(a)
	case DoProbe:
		s.probe(r)
	case DoSteer:
		s.steer(r)
	case DoRefuse:
		if err := s.keeper.Refuse(a.Generation); err != nil {
			s.log.Error("new connections still come", "generation", a.Generation, "err", err)
		}
	case DoDrain:
		s.drain(r)
	case DoSignal:
		if g := s.state.generation(a.Generation); g.Phase == Stopping {
			r.cut = s.watchCut(r)
		}
		if err := r.Signal(syscall.Signal(s.config.StopSignal)); err != nil {
			s.log.Error("the stop signal was not sent", "generation", a.Generation, "err", err)
		}
	case DoKill:
		r.cancel()
		if err := r.Signal(syscall.SIGKILL); err != nil {
			s.log.Error("a generation could not be killed", "generation", a.Generation, "err", err)
		}
	case DoKillIn:
		time.AfterFunc(a.After, func() { s.post(Event{Kind: KillDue, Generation: a.Generation}) })
	case DoRetryIn:
		s.log.Warn(s.state.CrashLoop(), "next start in", a.After)
		time.AfterFunc(a.After, func() { s.post(Event{Kind: RetryDue}) })
	case DoRelease:
		s.release(r)
	case DoTell:
		if w := s.tellers[a.Entry.Request]; w != nil {
			w.steered <- a.Entry
		}
	case DoResolve:
		s.resolve(a.Entry)
	case DoFinish:
		s.status = a.Status
	}
}

func (s *Supervisor) resolve(e Entry) {
	if e.Error == "" {
		s.log.Info(e.String())
	} else {
		s.log.Error(e.String()) // its output has just passed by
	}
	if w := s.tellers[e.Request]; w != nil && e.Request != 0 {
		delete(s.tellers, e.Request)
		w.ended <- e
	}
}

// Restart asks for a new generation and waits until the old one is gone, or until the new one serves. The command replaces the
// service's; nil leaves it. The entry tells of failure too.
func (s *Supervisor) Restart(ctx context.Context, command []string, supersede, wait bool) (Entry, error) {
	w := &waiter{steered: make(chan Entry, 1), ended: make(chan Entry, 1)}
	if err := s.ask(ctx, func() {
		s.state.Requests++
		id := s.state.Requests
		s.tellers[id] = w
		s.apply(Event{Kind: Requested, At: time.Now(), Request: Request{ID: id, Cause: ByRestart, Command: command, Supersede: supersede}})
	}); err != nil {
		return Entry{}, err
	}
	steered := w.steered
	if wait {
		steered = nil
	}
	select {
	case e := <-steered:
		return e, nil
	case e := <-w.ended:
		return e, nil
	case <-s.done:
		return Entry{}, errStopped
	case <-ctx.Done():
		return Entry{}, ctx.Err()
	}
}

var errStopped = errors.New("the service was stopped")

// Stop drains the service and ends it; force kills it. It returns when all is gone.
func (s *Supervisor) Stop(ctx context.Context, force bool) error {
	err := s.ask(ctx, func() {
		s.apply(Event{Kind: StopWanted, At: time.Now()})
		if force {
			s.apply(Event{Kind: StopWanted, At: time.Now()})
		}
	})
	if err != nil && !errors.Is(err, errStopped) {
		return err
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ask runs f in the loop.
func (s *Supervisor) ask(ctx context.Context, f func()) error {
	ran := make(chan struct{})
	select {
	case s.asked <- func() { f(); close(ran) }:
	case <-s.done:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
	<-ran
	return nil
}
