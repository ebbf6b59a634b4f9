//go:build linux

package supervisor

import (
	"context"
	"os"
	"slices"
	"time"

	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/internal/sys"
	"github.com/berth-net/berth/sockdiag"
)

// Status is what `berth status --json` prints of one service.
type Status struct {
	Name       string             `json:"name"`
	Control    string             `json:"control"`
	PID        int                `json:"pid"` // the keeper's, stable for the life of the service
	Supervisor int                `json:"supervisor_pid"`
	Kernel     string             `json:"kernel"`
	Command    []string           `json:"command"`
	Ready      string             `json:"ready"`
	Stopping   bool               `json:"stopping,omitempty"`
	CrashLoop  string             `json:"crash_loop,omitempty"`
	Queue      int                `json:"restarts_queued"`
	Means      keeper.Means       `json:"means"`
	Order      string             `json:"in_flight"` // how it is known what is in flight
	Group      string             `json:"group"`     // how a generation's processes are known
	Waiting    []ListenerStatus   `json:"waiting_rooms,omitempty"`
	Serving    []GenerationStatus `json:"generations"`
	Ledger     []Entry            `json:"ledger"` // the newest last
}

// GenerationStatus is one generation as it is now.
type GenerationStatus struct {
	Generation
	Age         float64          `json:"age_ms"` // since its phase began
	PIDs        []int            `json:"pids"`
	Connections int              `json:"connections"` // accepted and open
	Listeners   []ListenerStatus `json:"listeners"`
}

// ListenerStatus is a listener with its queue.
type ListenerStatus struct {
	keeper.Listener
	Address string `json:"address"`
	Waiting int    `json:"waiting"` // connections in its queue
	Limit   int    `json:"limit"`
}

// shownEntries is how many of the ledger's entries a status has.
const shownEntries = 20

// Status tells how the service is.
func (s *Supervisor) Status(ctx context.Context) (Status, error) {
	var st Status
	var members []processes
	err := s.ask(ctx, func() { st, members = s.snapshot() })
	if err != nil {
		return Status{}, err
	}
	s.count(&st, members)
	return st, nil
}

// snapshot is what the loop knows; the walks over the machine's processes are left to the caller.
func (s *Supervisor) snapshot() (Status, []processes) {
	st := Status{
		Name: s.config.Name, Control: s.config.Control, PID: os.Getppid(), Supervisor: os.Getpid(), Kernel: sys.KernelRelease(),
		Command: s.state.Command, Ready: s.config.Ready.String(), Stopping: s.state.Stopping, CrashLoop: s.state.CrashLoop(),
		Queue: len(s.state.Queue), Means: s.inventory.Means, Serving: []GenerationStatus{},
		Ledger: slices.Clone(s.state.Ledger[max(0, len(s.state.Ledger)-shownEntries):]),
	}
	queues, _ := s.keeper.Queues()
	show := func(l keeper.Listener) ListenerStatus {
		ls := ListenerStatus{Listener: l, Address: l.Form.String()}
		for _, q := range queues {
			if q.ID == l.ID {
				ls.Waiting, ls.Limit = q.Waiting, q.Limit
			}
		}
		return ls
	}
	for _, l := range s.listenersOf(0) {
		st.Waiting = append(st.Waiting, show(l))
	}
	var members []processes
	for _, g := range s.state.Generations {
		gs := GenerationStatus{Generation: *g, Age: ms(time.Since(g.Since)), Listeners: []ListenerStatus{}, PIDs: []int{}}
		for _, l := range s.listenersOf(g.Number) {
			gs.Listeners = append(gs.Listeners, show(l))
		}
		st.Serving = append(st.Serving, gs)
		p := processes{}
		if r := s.runs[g.Number]; r != nil {
			p = r.processes
			st.Order, st.Group = "exact order of packets (BPF on the generation's cgroup)", "cgroup v2"
			if r.order == nil {
				st.Order = "TCP's counters: " + r.orderWhy
			}
			if r.cgroup == "" {
				st.Group = "session and environment: " + r.cgroupWhy
			}
		}
		members = append(members, p)
	}
	return st, members
}

// count fills in processes and connections.
func (s *Supervisor) count(st *Status, members []processes) {
	var ports []uint16
	owner := map[uint64]int{}
	for i := range st.Serving {
		g := &st.Serving[i]
		if members[i].pid == 0 {
			continue
		}
		pids, err := members[i].List()
		if err != nil {
			continue
		}
		slices.Sort(pids)
		g.PIDs = append(g.PIDs, pids...)
		for _, pid := range pids {
			_ = sys.SocketFiles(pid, func(_ int, inode uint64) { owner[inode] = i + 1 })
		}
		for _, l := range g.Listeners {
			ports = append(ports, l.Form.Addr.Port())
		}
	}
	if len(ports) == 0 {
		return
	}
	filter := sockdiag.Filter{States: sockdiag.In(sockdiag.Established, sockdiag.CloseWait), LocalPorts: ports}
	for sock, err := range s.diag.Sockets(filter) {
		if err != nil {
			return
		}
		if i := owner[uint64(sock.Inode)]; i != 0 && sock.Inode != 0 {
			st.Serving[i-1].Connections++
		}
	}
}
