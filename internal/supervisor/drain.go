//go:build linux

package supervisor

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/berth-net/berth/internal/drain"
	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/internal/sys"
)

// drainConfig is how a generation's connections are watched; the listeners are those that it has now.
func (s *Supervisor) drainConfig(r *run) drain.Config {
	c := drain.Config{
		Pids: r.List, Order: r.order, Quiet: s.config.Quiet, KeepIdle: s.config.KeepIdle, Log: s.log,
	}
	if s.inventory.Means.Adoption == keeper.AdoptDuplicate {
		c.Duplicate = s.duplicate
	}
	ids := map[int]bool{}
	for _, l := range s.listenersOf(r.generation) {
		ids[l.ID] = true
		c.Ports = append(c.Ports, l.Form.Addr)
	}
	c.Queues = func() (int, error) {
		queues, err := s.keeper.Queues()
		waiting := 0
		for _, q := range queues {
			if ids[q.ID] {
				waiting += q.Waiting
			}
		}
		return waiting, err
	}
	return c
}

// duplicate duplicates a program's descriptor. Where only an ancestor may (Yama's ptrace_scope 1), the keeper does it.
func (s *Supervisor) duplicate(pid, fd int) (*os.File, error) {
	pidfd, err := sys.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	defer pidfd.Close()
	f, err := sys.PidfdGetfd(pidfd, fd)
	if errors.Is(err, os.ErrPermission) {
		return s.keeper.Duplicate(pid, fd)
	}
	return f, err
}

// drain waits until nothing is in flight on a generation, at most until the deadline.
func (s *Supervisor) drain(r *run) {
	config := s.drainConfig(r)
	ctx, cancel := context.WithTimeout(context.Background(), s.config.DrainTimeout)
	r.cancel = cancel
	end := func(d Drained, left int) {
		_ = s.ask(context.Background(), func() {
			r.left = left
			s.apply(Event{Kind: DrainEnded, At: time.Now(), Generation: r.generation, Drain: &d})
		})
	}
	if len(config.Ports) == 0 {
		cancel()
		go end(Drained{}, 0)
		return
	}
	began := time.Now()
	var wait time.Duration // how long the queue was seen to hold a connection
	queues := config.Queues
	config.Queues = func() (int, error) {
		n, err := queues()
		if n > 0 {
			wait = time.Since(began)
		}
		return n, err
	}
	go func() {
		defer cancel()
		var d Drained
		left := 0
		for {
			drainer, err := drain.New(config)
			if err != nil {
				s.log.Error("a generation can't be drained", "generation", r.generation, "err", err)
				break
			}
			res, err := drainer.Run(ctx)
			if err != nil {
				s.log.Error("a generation can't be drained", "generation", r.generation, "err", err)
			}
			d.Finished += res.Closed
			d.Polite += res.Ended
			d.Idle = res.Idle
			left = res.InFlight + res.Waiting
			if err != nil || !config.KeepIdle || res.Idle == 0 || ctx.Err() != nil {
				break
			}
			// Idle connections are left alone until the deadline, unless they end before.
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		d.Took, d.Wait = time.Since(began), wait
		end(d, left)
	}()
}

// watchCut watches a generation between the stop signal and its end: what is in flight on it then is cut. The returned function
// ends that and says how many connections it was.
func (s *Supervisor) watchCut(r *run) func() int {
	config := s.drainConfig(r)
	config.KeepIdle = true
	ctx, cancel := context.WithCancel(context.Background())
	inFlight := make(chan int, 1)
	if len(config.Ports) == 0 {
		cancel()
		return func() int { return 0 }
	}
	go func() {
		// Two looks back: the last one may have come after the processes had died and their connections with them.
		last, before := r.left, r.left
		defer func() { inFlight <- before }()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			drainer, err := drain.New(config)
			if err != nil {
				return
			}
			done := make(chan drain.Result, 1)
			go func() {
				res, _ := drainer.Run(ctx)
				done <- res
			}()
			for running := true; running; {
				select {
				case <-tick.C:
					if ctx.Err() == nil {
						before, last = last, drainer.Progress().InFlight
					}
				case <-done:
					// It ends when nothing is in flight, and it also ends when all connections are gone.
					running = false
				}
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
				before, last = last, 0
			}
		}
	}()
	return func() int {
		cancel()
		return <-inFlight
	}
}
