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
	"sync"
	"syscall"
	"time"

	"github.com/berth-net/berth/internal/drain"
	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/internal/sys"
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

// tidy closes listeners that their program has closed, on a second look: the keeper's descriptor would keep the port open.
func (s *Supervisor) tidy() {
	for _, g := range s.state.Generations {
		r := s.runs[g.Number]
		if r == nil || g.Dead || r.pid == 0 || (g.Phase != Serving && g.Phase != Starting) {
			continue
		}
		held := map[uint64]bool{}
		pids, err := r.List()
		if err != nil || len(pids) == 0 {
			continue
		}
		for _, pid := range pids {
			if err := sys.SocketFiles(pid, func(_ int, inode uint64) { held[inode] = true }); err != nil && !errors.Is(err, os.ErrNotExist) {
				held = nil // not all can be seen
				break
			}
		}
		for _, l := range s.listenersOf(g.Number) {
			switch {
			case held == nil || held[l.Inode] || l.Handed:
				delete(r.unheld, l.ID)
			case !r.unheld[l.ID]:
				r.unheld[l.ID] = true
			default:
				s.log.Info("the program has closed its listener", "generation", g.Number, "address", l.Form.String())
				if err := s.keeper.Close(l.ID); err != nil {
					s.log.Error("a closed listener is still held", "address", l.Form.String(), "err", err)
				}
				delete(r.unheld, l.ID)
				s.refresh()
				s.tellTrial(r)
			}
		}
	}
}

// refresh takes the keeper's word for which listeners there are.
func (s *Supervisor) refresh() {
	all, err := s.keeper.Listeners()
	if err != nil {
		s.log.Error("the listeners are not known", "err", err)
		return
	}
	clear(s.listeners)
	for _, l := range all {
		s.listeners[l.ID] = l
	}
}

func (s *Supervisor) tellTrial(r *run) {
	select {
	case <-r.listening:
	default:
	}
	r.listening <- s.listenersOf(r.generation)
}

func (s *Supervisor) listenersOf(generation int) []keeper.Listener {
	listeners := []keeper.Listener{}
	for _, l := range s.listeners {
		if l.Generation == generation {
			listeners = append(listeners, l)
		}
	}
	slices.SortFunc(listeners, func(a, b keeper.Listener) int { return a.ID - b.ID })
	return listeners
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

func (s *Supervisor) start(a Action) {
	r := s.newRun(a.Generation)
	env := slices.Clone(s.config.Env)
	if s.config.Ready.Kind == "notify" {
		path := fmt.Sprintf("%s.notify-%d", s.config.Control, a.Generation)
		var err error
		if r.notify, err = newNotifySocket(path); err != nil {
			close(r.begun)
			s.post(Event{Kind: StartFailed, Generation: a.Generation, Reason: err.Error()})
			return
		}
		env = append(env, "NOTIFY_SOCKET="+path)
	}
	if s.config.Dir != "" {
		env = append(env, "PWD="+s.config.Dir)
	}
	start := keeper.Start{Generation: a.Generation, Args: a.Command, Env: env, Dir: s.config.Dir}
	if s.config.FDs {
		for _, l := range s.config.Listen {
			start.Hand = append(start.Hand, keeper.Hand{Name: l.Name, Form: l.Form})
		}
	}
	path, err := FindCommand(a.Command[0], s.config.Dir, s.config.Env)
	if err != nil {
		close(r.begun)
		s.post(Event{Kind: StartFailed, Generation: a.Generation, Reason: err.Error()})
		return
	}
	start.Path = path
	if r.cgroup, err = makeCgroup(s.config.Name, os.Getppid(), a.Generation); err != nil {
		r.cgroupWhy = err.Error()
		r.orderWhy = "no cgroup v2: " + err.Error()
	} else if r.order, err = drain.NewOrder(r.cgroup); err != nil {
		r.orderWhy = err.Error()
	}
	start.Cgroup = r.cgroup
	s.log.Info("starting", "generation", a.Generation, "command", quote(a.Command))
	go func() {
		defer close(r.begun)
		begun, outputs, err := s.keeper.Start(start)
		if err != nil {
			s.post(Event{Kind: StartFailed, Generation: a.Generation, Reason: err.Error()})
			return
		}
		for i, out := range outputs {
			to := os.Stdout
			if i == 1 {
				to = os.Stderr
			}
			r.tail.copy(to, out)
		}
		_ = s.ask(context.Background(), func() {
			s.inventory.Means = begun.Means
			if begun.NoCgroup != "" {
				s.leaveCgroup(r, begun.NoCgroup)
			}
			s.apply(Event{Kind: Started, At: time.Now(), Generation: a.Generation, PID: begun.Worker.PID})
		})
	}()
}

// leaveCgroup does without the cgroup that a generation could not be started in.
func (s *Supervisor) leaveCgroup(r *run, why string) {
	if r.order != nil {
		r.order.Close()
		r.order = nil
	}
	if err := removeCgroup(r.cgroup); err != nil {
		s.log.Error("a cgroup stays behind", "path", r.cgroup, "err", err)
	}
	r.cgroup, r.cgroupWhy, r.orderWhy = "", why, "no cgroup v2: "+why
}

func (s *Supervisor) probe(r *run) {
	t := &trial{
		ready: s.config.Ready, timeout: s.config.ReadyTimeout, generation: r.generation, keeper: s.keeper, diag: s.diag,
		env: s.config.Env, dir: s.config.Dir, listening: r.listening,
	}
	if r.notify != nil {
		t.notified = r.notify.ready
	}
	serving := s.state.generation(s.state.Serving)
	for _, l := range s.listeners {
		if l.Generation != r.generation {
			t.others = append(t.others, l.Form)
		}
		switch {
		case l.Generation == r.generation || !l.Current:
		case serving != nil && l.Generation == serving.Number && !serving.Dead:
			t.forms = append(t.forms, l.Form)
		default: // a waiting room, or what a dead generation left
			t.ports = append(t.ports, l.Form.Addr.Port())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	s.tellTrial(r)
	go func() {
		err := t.run(ctx)
		if ctx.Err() != nil {
			return // it has ended, which says more
		}
		if err != nil {
			s.post(Event{Kind: NotReady, Generation: r.generation, Reason: err.Error()})
			return
		}
		s.post(Event{Kind: BecameReady, Generation: r.generation})
	}()
}

func (s *Supervisor) steer(r *run) {
	old := s.state.Serving
	queued := s.waiting(func(l keeper.Listener) bool { return l.Generation == old && old != 0 })
	if err := s.keeper.Steer(r.generation); err != nil {
		s.apply(Event{Kind: SteerFailed, At: time.Now(), Generation: r.generation, Reason: err.Error()})
		return
	}
	mine := s.listenersOf(r.generation)
	for id, l := range s.listeners {
		if l.Generation == r.generation {
			continue
		}
		served := slices.ContainsFunc(mine, func(m keeper.Listener) bool { return m.Form == l.Form })
		dead := l.Generation == 0 || s.state.generation(l.Generation) == nil || s.state.generation(l.Generation).Dead
		to := slices.IndexFunc(mine, func(m keeper.Listener) bool { return m.Form.Addr.Port() == l.Form.Addr.Port() })
		if dead && !served && to >= 0 {
			// What waited for one form of the port is brought to the one that the program chose.
			if err := s.keeper.Relay(keeper.Relay{Listener: id, To: mine[to].Form.Reach()}); err != nil {
				s.log.Error("connections that waited could not be forwarded", "address", l.Form.String(), "err", err)
			}
		}
	}
	if _, err := s.keeper.Release(0); err != nil {
		s.log.Error("a waiting room stays open", "err", err)
	}
	s.refresh()
	s.log.Info("serving", "generation", r.generation)
	s.apply(Event{Kind: Steered, At: time.Now(), Generation: r.generation, Queued: queued})
}

// waiting is how many connections wait on the listeners.
func (s *Supervisor) waiting(which func(keeper.Listener) bool) int {
	queues, err := s.keeper.Queues()
	if err != nil {
		return 0
	}
	n := 0
	for _, q := range queues {
		if l, ok := s.listeners[q.ID]; ok && which(l) {
			n += q.Waiting
		}
	}
	return n
}

// release closes a generation's listeners and cleans up behind it.
func (s *Supervisor) release(r *run) {
	if r.notify != nil {
		r.notify.Close()
	}
	r.cancel()
	delete(s.runs, r.generation)
	go func() {
		migrated, cut := 0, 0
		if r.cut != nil {
			cut = r.cut()
		}
		queues, err := s.keeper.Release(r.generation)
		if err != nil {
			s.log.Error("a generation's listeners are still held", "generation", r.generation, "err", err)
		}
		for _, q := range queues {
			migrated += q.Waiting
		}
		if r.order != nil {
			r.order.Close()
		}
		if err := removeCgroup(r.cgroup); err != nil {
			s.log.Error("a cgroup stays behind", "path", r.cgroup, "err", err)
		}
		select {
		case <-r.begun:
			waitFor(&r.tail.done, time.Second)
		case <-time.After(time.Second):
		}
		_ = s.ask(context.Background(), func() {
			s.refresh()
			s.apply(Event{Kind: Released, At: time.Now(), Generation: r.generation, Queued: migrated, Drain: &Drained{Cut: cut}, Output: r.tail.last()})
		})
	}()
}

func waitFor(wg *sync.WaitGroup, timeout time.Duration) {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(timeout):
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
