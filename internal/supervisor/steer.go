//go:build linux

package supervisor

import (
	"slices"
	"time"

	"github.com/berth-net/berth/internal/keeper"
)

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
