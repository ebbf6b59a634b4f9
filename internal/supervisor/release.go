//go:build linux

package supervisor

import (
	"context"
	"sync"
	"time"
)

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
