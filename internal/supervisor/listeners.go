//go:build linux

package supervisor

import (
	"errors"
	"os"
	"slices"

	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/internal/sys"
)

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
