//go:build linux

package supervisor

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// world is a machine that does what the model says, in any order that a real one might.
type world struct {
	t        *rapid.T
	state    State
	now      time.Time
	pending  []Event // what will happen in answer to an action
	alive    map[int]bool
	resolved map[uint64]int
	asked    []uint64
	finished bool
}

func (w *world) apply(ev Event) {
	w.now = w.now.Add(time.Duration(rapid.IntRange(0, 3000).Draw(w.t, "ms")) * time.Millisecond)
	ev.At = w.now
	for _, a := range w.state.Apply(ev) {
		w.act(a)
	}
	w.check()
}

func (w *world) expect(ev Event) { w.pending = append(w.pending, ev) }

func (w *world) act(a Action) {
	n := a.Generation
	g := w.state.generation(n)
	switch a.Kind {
	case DoStart:
		if rapid.IntRange(0, 9).Draw(w.t, "start fails") == 0 {
			w.expect(Event{Kind: StartFailed, Generation: n, Reason: "no such file"})
			return
		}
		w.alive[n] = true
		w.expect(Event{Kind: Started, Generation: n, PID: 1000 + n})
	case DoProbe:
		kind := rapid.SampledFrom([]EventKind{BecameReady, BecameReady, NotReady}).Draw(w.t, "probe")
		w.expect(Event{Kind: kind, Generation: n, Reason: "not ready within 1m"})
	case DoSteer:
		kind := rapid.SampledFrom([]EventKind{Steered, Steered, Steered, SteerFailed}).Draw(w.t, "steer")
		w.expect(Event{Kind: kind, Generation: n, Reason: "no map"})
	case DoDrain:
		w.expect(Event{Kind: DrainEnded, Generation: n, Drain: &Drained{Polite: 1}})
	case DoSignal, DoKill:
		serving := w.state.generation(w.state.Serving)
		if n == w.state.Serving && !w.state.Stopping {
			w.t.Fatalf("generation %d is signalled while it serves", n)
		}
		if g.Phase == Stopping && !w.state.Stopping && (serving == nil || serving.Number == n) {
			w.t.Fatalf("generation %d is signalled before another serves", n)
		}
		if w.alive[n] {
			delete(w.alive, n)
			w.dies(n)
		}
	case DoKillIn:
		w.expect(Event{Kind: KillDue, Generation: n})
	case DoRetryIn:
		w.expect(Event{Kind: RetryDue})
	case DoRelease:
		if w.alive[n] {
			w.t.Fatalf("the listeners of generation %d are closed while it lives", n)
		}
		if n == w.state.Serving && !w.state.Stopping {
			w.t.Fatalf("the listeners of the serving generation %d are closed", n)
		}
		w.expect(Event{Kind: Released, Generation: n, Queued: 2})
	case DoResolve:
		w.resolved[a.Entry.Request]++
		if e := a.Entry; e.Error == "" && e.Request != 0 && e.Steered.IsZero() {
			w.t.Fatalf("a restart succeeded that was never steered: %+v", e)
		}
	case DoFinish:
		w.finished = true
	}
}

// dies ends a generation's processes; the end of the first and the end of all are told in either order.
func (w *world) dies(n int) {
	events := []Event{{Kind: Exited, Generation: n, Reason: "killed by signal 9", Failure: rapid.Bool().Draw(w.t, "fails")}, {Kind: Gone, Generation: n}}
	if rapid.Bool().Draw(w.t, "gone first") {
		slices.Reverse(events)
	}
	w.pending = append(w.pending, events...)
}

func (w *world) check() {
	s := &w.state
	if c := s.generation(s.Candidate); s.Candidate != 0 && (c == nil || s.Trial == nil || c.Phase != Starting) {
		w.t.Fatalf("candidate %d is no candidate: %+v", s.Candidate, c)
	}
	serving := 0
	for _, g := range s.Generations {
		if g.Phase == Serving {
			serving++
		}
		if (g.Phase == Draining || g.Phase == Stopping) && g.Entry == nil {
			w.t.Fatalf("nobody accounts for generation %d", g.Number)
		}
	}
	if serving > 1 {
		w.t.Fatalf("%d generations serve", serving)
	}
	if w.finished != s.Finished {
		w.t.Fatal("finished without saying so")
	}
}

// settle lets all that is pending happen, and nothing else.
func (w *world) settle() {
	for range 1000 {
		if len(w.pending) == 0 || w.finished {
			return
		}
		w.happen()
	}
	w.t.Fatalf("it never comes to rest: %+v", w.state)
}

func (w *world) happen() {
	i := rapid.IntRange(0, len(w.pending)-1).Draw(w.t, "which")
	// What is told of one generation keeps its order.
	for j := range i {
		// But that it has started is told by another way.
		if w.pending[j].Generation == w.pending[i].Generation && w.pending[j].Kind != Started {
			i = j
			break
		}
	}
	ev := w.pending[i]
	w.pending = slices.Delete(w.pending, i, i+1)
	w.apply(ev)
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{t: t, now: time.Unix(1e9, 0), alive: map[int]bool{}, resolved: map[uint64]int{}}
		w.state = State{Command: []string{"server"}, Limits: Limits{KillAfter: time.Second}}
		w.apply(Event{Kind: Requested, Request: Request{Cause: ByStart}})
		id := uint64(0)
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			if w.finished {
				break
			}
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0, 1:
				id++
				w.asked = append(w.asked, id)
				w.apply(Event{Kind: Requested, Request: Request{ID: id, Cause: ByRestart, Supersede: rapid.Bool().Draw(t, "supersede")}})
			case 2:
				if len(w.alive) > 0 {
					// A program dies, whichever.
					n := rapid.SampledFrom(slices.Sorted(mapKeys(w.alive))).Draw(t, "dies")
					delete(w.alive, n)
					w.dies(n)
				}
			default:
				if len(w.pending) > 0 {
					w.happen()
				}
			}
		}
		if !w.finished {
			w.apply(Event{Kind: StopWanted})
			w.settle()
		}
		if !w.finished {
			t.Fatalf("it does not end: %+v", w.state)
		}
		if len(w.alive) != 0 {
			t.Fatalf("left alive: %v", w.alive)
		}
		for _, id := range w.asked {
			if w.resolved[id] != 1 && !(w.resolved[id] == 0 && !w.state.Stopping) {
				t.Fatalf("request %d was answered %d times", id, w.resolved[id])
			}
		}
	})
}

func mapKeys(m map[int]bool) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// start brings a service up to its first serving generation.
func start(t *testing.T) (*State, time.Time) {
	t.Helper()
	now := time.Unix(1e9, 0)
	s := &State{Command: []string{"server"}, Limits: Limits{KillAfter: time.Second}}
	s.Apply(Event{Kind: Requested, At: now, Request: Request{Cause: ByStart}})
	s.Apply(Event{Kind: Started, At: now, Generation: 1, PID: 10})
	s.Apply(Event{Kind: BecameReady, At: now, Generation: 1})
	s.Apply(Event{Kind: Steered, At: now, Generation: 1})
	if s.Serving != 1 || len(s.Ledger) != 1 {
		t.Fatalf("not serving: %+v", s)
	}
	return s, now
}

func kinds(acts []Action) []ActionKind {
	var k []ActionKind
	for _, a := range acts {
		k = append(k, a.Kind)
	}
	return k
}

func TestBackoff(t *testing.T) {
	s, now := start(t)
	var pauses []time.Duration
	die := func(n int) {
		for _, ev := range []Event{
			{Kind: Exited, Generation: n, Reason: "exit status 3", Failure: true}, {Kind: Gone, Generation: n}, {Kind: Released, Generation: n},
		} {
			if ev.Kind == Released && n == 1 {
				continue // what waits on it is still needed
			}
			ev.At = now
			for _, a := range s.Apply(ev) {
				if a.Kind == DoRetryIn {
					pauses = append(pauses, a.After)
				}
			}
		}
	}
	die(1)
	for n := 2; n < 12; n++ {
		if s.Candidate != n {
			t.Fatalf("generation %d was not started: %+v", n, s)
		}
		s.Apply(Event{Kind: Started, At: now, Generation: n, PID: 10 + n})
		die(n)
		s.Apply(Event{Kind: RetryDue, At: now})
	}
	want := []time.Duration{100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000, 10000}
	for i := range want {
		want[i] *= time.Millisecond
	}
	if !slices.Equal(pauses, want) {
		t.Errorf("pauses %v, want %v", pauses, want)
	}
	if got, want := s.CrashLoop(), "crash loop: 11 in a row, the last: exit status 3"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestCommandStaysAfterFailure(t *testing.T) {
	s, now := start(t)
	s.Apply(Event{Kind: Requested, At: now, Request: Request{ID: 7, Cause: ByRestart, Command: []string{"broken"}}})
	if got := s.generation(2).Command; !slices.Equal(got, []string{"broken"}) {
		t.Fatalf("started %v", got)
	}
	s.Apply(Event{Kind: StartFailed, At: now, Generation: 2, Reason: "no"})
	acts := s.Apply(Event{Kind: Released, At: now, Generation: 2, Output: []string{"panic"}})
	if !slices.Contains(kinds(acts), DoResolve) || !slices.Equal(acts[0].Entry.Output, []string{"panic"}) {
		t.Errorf("actions %+v", acts)
	}
	if s.Serving != 1 || !slices.Equal(s.Command, []string{"server"}) {
		t.Errorf("serving %d with %v", s.Serving, s.Command)
	}
}
