//go:build linux

package supervisor

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/berth-net/berth/internal/drain"
	"github.com/berth-net/berth/internal/keeper"
)

func (s *Supervisor) start(a Action) {
	r := s.newRun(a.Generation)
	env := slices.Clone(s.config.Env)
	if s.config.Ready.Kind == "notify" {
		path := fmt.Sprintf("%s.notify-%d", s.config.Control, a.Generation)
		var err error
		if r.notify, err = newNotifySocket(path, func() ([]int, error) { return s.members(r) }); err != nil {
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

// members are a generation's processes, for a task.
func (s *Supervisor) members(r *run) ([]int, error) {
	var p processes
	if err := s.ask(context.Background(), func() { p = r.processes }); err != nil {
		return nil, err
	}
	return p.List()
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

func (s *Supervisor) tellTrial(r *run) {
	select {
	case <-r.listening:
	default:
	}
	r.listening <- s.listenersOf(r.generation)
}
