//go:build linux

package supervisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/berth-net/berth/internal/keeper"
)

// recover takes over what an earlier supervisor left: what serves or drains goes on, a candidate is ended.
func (s *Supervisor) recover(outputs []*os.File) {
	s.state.Limits.KillAfter = s.config.KillAfter
	s.state.Command = s.config.Command
	if s.inventory.State == nil {
		return
	}
	if err := json.Unmarshal(s.inventory.State, &s.state); err != nil {
		s.log.Error("the state an earlier supervisor left can't be read", "err", err)
	}
	for _, l := range s.inventory.Listeners {
		s.listeners[l.ID] = l
	}
	for _, w := range s.inventory.Workers {
		r := s.newRun(w.Generation)
		r.pid = w.PID
		close(r.begun)
		for _, out := range outputs[:w.Outputs] {
			r.tail.copy(os.Stdout, out)
		}
		outputs = outputs[w.Outputs:]
		if path, err := serviceCgroup(s.config.Name, os.Getppid()); err == nil {
			if path = filepath.Join(path, fmt.Sprint(w.Generation)); isDir(path) {
				r.cgroup = path
			}
		}
		if w.Exited && w.Status != nil {
			s.post(Event{Kind: Exited, Generation: w.Generation, Reason: keeper.Describe(*w.Status), Failure: !w.Status.Exited() || w.Status.ExitStatus() != 0})
		}
		if w.Gone {
			s.post(Event{Kind: Gone, Generation: w.Generation})
		}
	}
	for _, g := range s.state.Generations {
		if s.runs[g.Number] == nil {
			// The keeper knows it no more, so nothing of it is left.
			close(s.newRun(g.Number).begun)
			s.post(Event{Kind: Exited, Generation: g.Number, Reason: "it ended while the supervisor was replaced", Failure: true})
			s.post(Event{Kind: Gone, Generation: g.Number})
		}
		switch {
		case g.Closing:
			s.carryOut(Action{Kind: DoRelease, Generation: g.Number})
		case g.Number == s.state.Candidate:
			s.post(Event{Kind: NotReady, Generation: g.Number, Reason: "the supervisor was replaced meanwhile"})
		case g.Phase == Draining:
			s.carryOut(Action{Kind: DoDrain, Generation: g.Number})
		case g.Phase == Stopping:
			s.carryOut(Action{Kind: DoSignal, Generation: g.Number})
			s.carryOut(Action{Kind: DoKillIn, Generation: g.Number, After: s.state.Limits.KillAfter})
		}
	}
	if s.state.Waiting {
		s.carryOut(Action{Kind: DoRetryIn, After: s.state.Backoff()})
	}
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
