//go:build linux

package supervisor

import (
	"fmt"
	"slices"
	"time"
)

// Phase is where a generation is in its life.
type Phase string

// A generation is starting → serving → draining → stopping → stopped, or failed before it ever served.
const (
	Starting Phase = "starting"
	Serving  Phase = "serving"
	Draining Phase = "draining"
	Stopping Phase = "stopping"
	Failed   Phase = "failed"
)

// Generation is one start of the service's command.
type Generation struct {
	Number  int       `json:"number"`
	Command []string  `json:"command"`
	PID     int       `json:"pid,omitempty"`
	Phase   Phase     `json:"phase"`
	Since   time.Time `json:"since"` // when the phase began
	Exit    string    `json:"exit,omitempty"`
	Dead    bool      `json:"dead,omitempty"`    // its first process failed, or none is left
	Gone    bool      `json:"gone,omitempty"`    // no process is left
	Closing bool      `json:"closing,omitempty"` // its listeners are being closed
	Reason  string    `json:"reason,omitempty"`

	// Entry is the ledger's entry that is complete when this generation is released.
	Entry *Entry `json:"entry,omitempty"`
}

// Request asks for a new generation.
type Request struct {
	ID        uint64   `json:"id"`
	Cause     Cause    `json:"cause"`
	Command   []string `json:"command,omitempty"` // nil: the one that the service has
	Supersede bool     `json:"supersede,omitempty"`
}

// State is all that the supervisor has to know to go on. It is a function of the events so far: Apply alone changes it.
type State struct {
	Command     []string      `json:"command"`
	Generations []*Generation `json:"generations"`
	Last        int           `json:"last"`                // the newest generation's number
	Serving     int           `json:"serving,omitempty"`   // to which new connections go; it may be dead
	Candidate   int           `json:"candidate,omitempty"` // which is to serve next
	Trial       *Entry        `json:"trial,omitempty"`     // the candidate's entry until it serves or fails
	Queue       []Request     `json:"queue,omitempty"`
	Crashes     int           `json:"crashes,omitempty"` // in a row
	CrashExit   string        `json:"crash_exit,omitempty"`
	Waiting     bool          `json:"waiting,omitempty"` // for the back-off's timer
	Stopping    bool          `json:"stopping,omitempty"`
	Finished    bool          `json:"finished,omitempty"`
	Ledger      []Entry       `json:"ledger,omitempty"`
	Restarts    int           `json:"restarts,omitempty"`
	Requests    uint64        `json:"requests,omitempty"` // the last request's ID

	Limits Limits `json:"limits"`
}

// Limits are the times that the model goes by.
type Limits struct {
	KillAfter time.Duration `json:"kill_after"`
}

// An Event is something that happened; fields that its kind does not need are zero.
type Event struct {
	Kind       EventKind
	At         time.Time
	Generation int
	Request    Request
	PID        int
	Reason     string // of a failure; of Exited: the exit status
	Failure    bool   // of Exited: by a signal or with a status other than 0
	Queued     int    // of Steered: connections on the old queues; of Released: those that migrated
	Drain      *Drained
	Output     []string // of Released: the last lines
}

// EventKind names an event.
type EventKind string

// The events.
const (
	Requested   EventKind = "requested"
	StopWanted  EventKind = "stop wanted"
	Started     EventKind = "started"
	StartFailed EventKind = "start failed"
	BecameReady EventKind = "ready"
	NotReady    EventKind = "not ready"
	Steered     EventKind = "steered"
	SteerFailed EventKind = "steering failed"
	DrainEnded  EventKind = "drained"
	Exited      EventKind = "exited"
	Gone        EventKind = "gone"
	Released    EventKind = "released"
	KillDue     EventKind = "kill due"
	RetryDue    EventKind = "retry due"
)

// An Action is what is to be done because of an event.
type Action struct {
	Kind       ActionKind
	Generation int
	Command    []string
	After      time.Duration
	Entry      Entry
	Status     int
}

// ActionKind names an action.
type ActionKind string

// The actions.
const (
	DoStart   ActionKind = "start"
	DoProbe   ActionKind = "probe"   // until ready
	DoSteer   ActionKind = "steer"   // new connections to it
	DoRefuse  ActionKind = "refuse"  // let it get no new connection
	DoDrain   ActionKind = "drain"   // until nothing is in flight
	DoSignal  ActionKind = "signal"  // the stop signal
	DoKill    ActionKind = "kill"    // every process
	DoRelease ActionKind = "release" // close its listeners
	DoKillIn  ActionKind = "kill in"
	DoRetryIn ActionKind = "retry in"
	DoTell    ActionKind = "tell"    // whoever asked that the candidate serves
	DoResolve ActionKind = "resolve" // the entry is complete
	DoFinish  ActionKind = "finish"
)

// keptEntries bounds the ledger.
const keptEntries = 100

// Back-off between generations that crash: none for the first, then doubling.
const (
	firstBackoff = 100 * time.Millisecond
	mostBackoff  = 10 * time.Second
)

// Apply takes an event and says what is to be done. It does nothing else.
func (s *State) Apply(ev Event) []Action {
	if s.Finished {
		return nil
	}
	var acts []Action
	do := func(a Action) { acts = append(acts, a) }
	g := s.generation(ev.Generation)
	if g == nil && ev.Kind != Requested && ev.Kind != StopWanted && ev.Kind != RetryDue {
		return nil
	}
	switch ev.Kind {
	case Requested:
		s.request(ev, do)
	case StopWanted:
		s.stop(ev, do)
	case Started:
		g.PID = ev.PID
		switch {
		case g.Gone || g.Closing: // its end was told before its start
		case g.Phase == Failed:
			s.end(g, do)
		default:
			do(Action{Kind: DoProbe, Generation: g.Number})
		}
	case StartFailed:
		g.Gone = true
		if g.Phase == Failed {
			s.release(g, do)
		} else {
			s.fail(g, ev, do)
		}
	case NotReady, SteerFailed:
		if g.Number == s.Candidate {
			s.fail(g, ev, do)
		}
	case BecameReady:
		if g.Number == s.Candidate {
			s.Trial.Ready = ev.At
			do(Action{Kind: DoSteer, Generation: g.Number})
		}
	case Steered:
		if g.Number == s.Candidate {
			s.serve(g, ev, do)
		}
	case DrainEnded:
		if g.Phase == Draining {
			if g.Entry != nil && ev.Drain != nil {
				g.Entry.Drained.add(*ev.Drain)
			}
			g.enter(Stopping, ev.At)
			if g.Gone {
				s.release(g, do)
				break
			}
			s.end(g, do)
		}
	case KillDue:
		if (g.Phase == Stopping || g.Phase == Failed) && !g.Gone {
			do(Action{Kind: DoKill, Generation: g.Number})
		}
	case Exited, Gone:
		s.ended(g, ev, do)
	case Released:
		s.released(g, ev, do)
	case RetryDue:
		s.Waiting = false
	}
	s.next(ev, do)
	return acts
}

func (g *Generation) enter(p Phase, at time.Time) { g.Phase, g.Since = p, at }

func (s *State) generation(n int) *Generation {
	for _, g := range s.Generations {
		if g.Number == n {
			return g
		}
	}
	return nil
}

func (s *State) request(ev Event, do func(Action)) {
	r := ev.Request
	if s.Stopping {
		do(Action{Kind: DoResolve, Entry: Entry{Request: r.ID, Cause: r.Cause, Began: ev.At, Ended: ev.At, Error: "the service is stopping"}})
		return
	}
	c := s.generation(s.Candidate)
	if !r.Supersede {
		s.Queue = append(s.Queue, r)
		return
	}
	s.Queue = slices.Insert(s.Queue, 0, r)
	if c != nil {
		s.fail(c, Event{At: ev.At, Reason: "superseded by a newer restart"}, do)
	}
}

func (s *State) begin(r Request, at time.Time, do func(Action)) {
	s.Last++
	command := r.Command
	if command == nil {
		command = s.Command
	}
	s.Restarts++
	s.Trial = &Entry{Number: s.Restarts, Request: r.ID, Cause: r.Cause, From: s.Serving, To: s.Last, Began: at}
	s.Candidate = s.Last
	s.Waiting = false
	s.Generations = append(s.Generations, &Generation{Number: s.Last, Command: command, Phase: Starting, Since: at})
	do(Action{Kind: DoStart, Generation: s.Last, Command: command})
}

// fail ends a candidate; what serves goes on serving.
func (s *State) fail(g *Generation, ev Event, do func(Action)) {
	s.Candidate = 0
	g.enter(Failed, ev.At)
	g.Reason = ev.Reason
	g.Entry, s.Trial = s.Trial, nil
	g.Entry.Error = ev.Reason
	switch {
	case g.Gone:
		s.release(g, do)
	case g.PID != 0:
		s.end(g, do)
	}
}

// end stops a generation that serves nobody.
func (s *State) end(g *Generation, do func(Action)) {
	do(Action{Kind: DoSignal, Generation: g.Number})
	do(Action{Kind: DoKillIn, Generation: g.Number, After: s.Limits.KillAfter})
}

// serve makes the candidate the serving generation; the old one, if any is left, drains.
func (s *State) serve(g *Generation, ev Event, do func(Action)) {
	entry, old := s.Trial, s.generation(s.Serving)
	s.Trial, s.Candidate, s.Serving = nil, 0, g.Number
	s.Command = g.Command
	g.enter(Serving, ev.At)
	entry.Steered, entry.Queued = ev.At, ev.Queued
	do(Action{Kind: DoTell, Generation: g.Number, Entry: *entry})
	switch {
	case old == nil:
		s.complete(entry, ev.At, do)
	case old.Gone:
		old.Entry = entry
		old.enter(Stopping, ev.At)
		s.release(old, do)
	default:
		old.Entry = entry
		old.enter(Draining, ev.At)
		do(Action{Kind: DoDrain, Generation: old.Number})
	}
	if g.Dead {
		s.crashed(g, ev)
	}
}

func (s *State) ended(g *Generation, ev Event, do func(Action)) {
	if ev.Kind == Gone {
		g.Gone = true
	} else {
		g.Exit = ev.Reason
		// A first process that ends well and leaves others behind has become a daemon.
		g.Dead = g.Dead || ev.Failure
	}
	if g.Exit == "" {
		return // how its first process ended is told in a moment
	}
	wasDead := g.Dead && !ev.Failure
	g.Dead = g.Dead || g.Gone
	switch {
	case g.Number == s.Candidate:
		if g.Dead {
			s.fail(g, Event{At: ev.At, Reason: "it ended before it was ready: " + g.Exit}, do)
		}
	case g.Number == s.Serving && g.Phase == Serving:
		if g.Dead && !wasDead {
			s.crashed(g, ev)
		}
	case g.Phase == Draining:
		// Its drain ends by itself now.
	case g.Gone:
		s.release(g, do)
	}
}

// release has a generation's listeners closed, once.
func (s *State) release(g *Generation, do func(Action)) {
	if !g.Closing {
		g.Closing = true
		do(Action{Kind: DoRelease, Generation: g.Number})
	}
}

func (s *State) crashed(g *Generation, ev Event) {
	s.Crashes++
	// A generation that served ten times longer than the pause that would follow was well.
	if ev.At.Sub(g.Since) >= min(10*max(s.Backoff(), firstBackoff), mostBackoff) {
		s.Crashes = 1
	}
	s.CrashExit = g.Exit
}

func (s *State) released(g *Generation, ev Event, do func(Action)) {
	if g.Entry != nil {
		g.Entry.Migrated += ev.Queued
		if ev.Drain != nil {
			g.Entry.Drained.add(*ev.Drain)
		}
		if g.Phase == Failed {
			g.Entry.Output = ev.Output
		} else if g.Dead && g.Entry.Cause == ByCrash && ev.Queued > 0 {
			g.Entry.Drained.Wait = max(g.Entry.Drained.Wait, g.Entry.Steered.Sub(g.Entry.Began))
		}
		s.complete(g.Entry, ev.At, do)
	}
	if g.Phase == Failed && !s.Stopping {
		if serving := s.generation(s.Serving); serving == nil && len(s.Queue) == 0 {
			// The very first start failed: there is nothing to go on with.
			s.Finished = true
			do(Action{Kind: DoFinish, Status: 1})
		} else if serving != nil && serving.Dead {
			s.Crashes++
			s.CrashExit = g.Exit
			if g.Exit == "" {
				s.CrashExit = g.Reason
			}
		}
	}
	s.Generations = slices.DeleteFunc(s.Generations, func(o *Generation) bool { return o == g })
}

func (s *State) complete(e *Entry, at time.Time, do func(Action)) {
	e.Ended = at
	s.Ledger = append(s.Ledger, *e)
	if len(s.Ledger) > keptEntries {
		s.Ledger = slices.Delete(s.Ledger, 0, len(s.Ledger)-keptEntries)
	}
	do(Action{Kind: DoResolve, Entry: *e})
}

func (s *State) stop(ev Event, do func(Action)) {
	if s.Stopping {
		for _, g := range s.Generations {
			if !g.Gone && g.PID != 0 {
				do(Action{Kind: DoKill, Generation: g.Number})
			}
		}
		return
	}
	s.Stopping = true
	for _, r := range s.Queue {
		do(Action{Kind: DoResolve, Entry: Entry{Request: r.ID, Cause: r.Cause, Began: ev.At, Ended: ev.At, Error: "the service was stopped"}})
	}
	s.Queue = nil
	if c := s.generation(s.Candidate); c != nil {
		s.fail(c, Event{At: ev.At, Reason: "the service was stopped"}, do)
	}
	if g := s.generation(s.Serving); g != nil {
		s.Restarts++
		g.Entry = &Entry{Number: s.Restarts, Cause: ByStop, From: g.Number, Began: ev.At, Steered: ev.At}
		do(Action{Kind: DoRefuse, Generation: g.Number})
		if g.Gone {
			s.release(g, do)
		} else {
			g.enter(Draining, ev.At)
			do(Action{Kind: DoDrain, Generation: g.Number})
		}
	}
}

// next begins what has been waiting, once its time has come.
func (s *State) next(ev Event, do func(Action)) {
	if s.Finished {
		return
	}
	if s.Stopping {
		if len(s.Generations) == 0 {
			s.Finished = true
			do(Action{Kind: DoFinish})
		}
		return
	}
	if s.Candidate != 0 {
		return
	}
	failing := slices.ContainsFunc(s.Generations, func(g *Generation) bool { return g.Phase == Failed })
	retiring := slices.ContainsFunc(s.Generations, func(g *Generation) bool { return g.Phase != Serving })
	serving := s.generation(s.Serving)
	dead := serving != nil && serving.Dead
	switch {
	case failing:
	case len(s.Queue) > 0 && (dead || !retiring):
		r := s.Queue[0]
		s.Queue = slices.Delete(s.Queue, 0, 1)
		s.begin(r, ev.At, do)
	case !dead:
	case s.Crashes <= 1:
		s.begin(Request{Cause: ByCrash}, ev.At, do)
	case s.Waiting:
	case ev.Kind == RetryDue:
		s.begin(Request{Cause: ByCrash}, ev.At, do)
	default:
		s.Waiting = true
		do(Action{Kind: DoRetryIn, After: s.Backoff()})
	}
}

// Backoff is the pause before the next generation after the crashes so far.
func (s *State) Backoff() time.Duration {
	if s.Crashes <= 1 {
		return 0
	}
	d := firstBackoff << min(s.Crashes-2, 10)
	return min(d, mostBackoff)
}

// CrashLoop says that the service crashes again and again, and how; empty if it does not.
func (s *State) CrashLoop() string {
	if serving := s.generation(s.Serving); s.Crashes < 2 || serving == nil || !serving.Dead {
		return ""
	}
	return fmt.Sprintf("crash loop: %d in a row, the last: %s", s.Crashes, s.CrashExit)
}

// bounded is the state as it is stored: without what only a person wants to read, for the keeper takes no more than a message.
func (s *State) bounded() *State {
	b := *s
	b.Ledger = slices.Clone(s.Ledger[max(0, len(s.Ledger)-shownEntries):])
	for i := range b.Ledger {
		b.Ledger[i].Output = nil
		b.Ledger[i].Error = cut(b.Ledger[i].Error)
	}
	return &b
}

// cut bounds an error's text.
func cut(text string) string {
	if len(text) > 1000 {
		return text[:1000] + "…"
	}
	return text
}
