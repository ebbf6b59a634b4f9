//go:build linux

package keeper

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/berth-net/berth/internal/steer"
	"github.com/berth-net/berth/internal/sys"
)

// hold opens a waiting room.
func (k *Keeper) hold(form Form) (Listener, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l, err := k.freshListener(nil, form)
	if err != nil {
		return Listener{}, err
	}
	return l.Listener, nil
}

// freshListener is a listening socket of the keeper's own, in its group. Where nothing migrates, a generation gets the one
// on which connections wait.
func (k *Keeper) freshListener(w *worker, form Form) (*listener, error) {
	generation := 0
	if w != nil {
		generation = w.Generation
	}
	if w != nil && k.mode == steer.Classic {
		if l := k.inheritable(w, form); l != nil {
			l.Generation = generation
			return l, nil
		}
	}
	sock, err := k.makeSocket(w, form.Family())
	if err != nil {
		return nil, err
	}
	if form.Family() == sys.INET6 {
		err = sys.SetV6Only(sock, form.V6Only)
	}
	if err == nil {
		err = k.bind(sock, form)
	}
	if err == nil {
		err = sys.ListenOn(sock, leastBacklog)
	}
	var kind sys.Kind
	if err == nil {
		kind, err = sys.KindOf(sock)
	}
	if err != nil {
		sock.Close()
		return nil, fmt.Errorf("listen on %s: %w", form, err)
	}
	l := &listener{Listener: Listener{Form: form, Generation: generation, Inode: kind.Inode, Backlog: leastBacklog}, sock: sock, origin: generation}
	if err := k.join(l); err != nil {
		return nil, err
	}
	return l, nil
}

// join makes a listening socket part of its form's group. Until it is steered to, it gets no connection, unless it is the first.
func (k *Keeper) join(l *listener) error {
	g := k.groups[l.Form]
	if g == nil {
		var err error
		if g, err = steer.NewGroup(k.mode); err != nil {
			l.sock.Close()
			return fmt.Errorf("steer connections to %s: %w", l.Form, err)
		}
		k.groups[l.Form] = g
		l.Current = true
	}
	slot, err := g.Add(l.sock)
	if err != nil {
		if l.Current {
			delete(k.groups, l.Form)
			g.Close()
			l.Current = false
		}
		// The program keeps a descriptor: shut down, its socket leaves the group.
		_ = sys.StopListening(l.sock)
		l.sock.Close()
		return fmt.Errorf("steer connections to %s: %w", l.Form, err)
	}
	k.lastID++
	l.ID, l.slot = k.lastID, slot
	k.listeners[l.ID] = l
	stale := k.stale(l)
	if l.Current || k.currentGeneration(l.Form) == l.Generation {
		// The form's first, or one more of the serving generation's, which share.
		if err := k.steerForm(l.Form, l.Generation, stale...); err != nil {
			return err
		}
	}
	for _, old := range stale {
		k.close(old)
	}
	return nil
}

// stale are the listeners of l's form and generation that no process has any more: the program closed them and made l, and nobody would
// accept on them.
func (k *Keeper) stale(l *listener) (stale []*listener) {
	for _, other := range k.listeners {
		// Several that share a port are no sign of it, and each look is a walk over all processes.
		if other != l && other.Form == l.Form && other.Generation == l.Generation && !other.Handed && !(l.reuse && other.reuse) && !holds(other.Inode) {
			stale = append(stale, other)
		}
	}
	return stale
}

func (k *Keeper) currentGeneration(form Form) int {
	for _, l := range k.listeners {
		if l.Form == form && l.Current {
			return l.Generation
		}
	}
	return -1
}

// steer sends the new connections of all forms of a generation to it.
func (k *Keeper) steer(generation int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	forms := map[Form]bool{}
	for _, l := range k.listeners {
		if l.Generation == generation {
			forms[l.Form] = true
		}
	}
	before := map[Form]int{}
	for form := range forms {
		before[form] = k.currentGeneration(form)
		if err := k.steerForm(form, generation); err != nil {
			// All or none: those that were steered go back.
			delete(before, form)
			for done, old := range before {
				if back := k.steerForm(done, old); back != nil {
					err = errors.Join(err, back)
				}
			}
			return err
		}
	}
	return nil
}

// steerForm sends a form's new connections to a generation's listeners, but for some.
func (k *Keeper) steerForm(form Form, generation int, without ...*listener) error {
	var slots []steer.Slot
	for _, l := range k.sorted() {
		if l.Form == form && l.Generation == generation && !slices.Contains(without, l) {
			slots = append(slots, l.slot)
		}
	}
	if err := k.groups[form].Steer(slots...); err != nil {
		return fmt.Errorf("steer %s to generation %d: %w", form, generation, err)
	}
	for _, l := range k.listeners {
		if l.Form == form {
			l.Current = l.Generation == generation
		}
	}
	if n, err := k.groups[form].Strays(); err == nil && n > k.strays[form] {
		k.log.Error("connections went to a listener that was not chosen, for the chosen one had left its group", "address", form.String(), "connections", n-k.strays[form])
		k.strays[form] = n
	}
	return nil
}

func (k *Keeper) sorted() []*listener {
	all := make([]*listener, 0, len(k.listeners))
	for _, l := range k.listeners {
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b *listener) int { return a.ID - b.ID })
	return all
}

func (k *Keeper) probe(p Probe) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.listeners[p.Listener]
	if l == nil {
		return fmt.Errorf("probe: there is no listener %d", p.Listener)
	}
	if err := k.groups[l.Form].Probe(l.slot, p.From); err != nil {
		return err
	}
	// A listener that waits for data before it accepts would not accept a probe that sends none.
	if !p.From.IsValid() {
		if l.deferred != 0 {
			_, err := sys.DeferAccept(l.sock, l.deferred)
			l.deferred = 0
			return err
		}
		return nil
	}
	was, err := sys.DeferAccept(l.sock, 0)
	if was != 0 {
		l.deferred = was
	}
	return err
}

func (k *Keeper) list() []Listener {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := []Listener{}
	for _, l := range k.sorted() {
		all = append(all, l.Listener)
	}
	return all
}

// closeOne closes a listener that its program has closed.
func (k *Keeper) closeOne(id int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.listeners[id]
	if l == nil {
		return nil
	}
	if l.Current {
		// Others of its generation may go on.
		if err := k.steerForm(l.Form, l.Generation, l); err != nil && len(k.others(l)) > 0 {
			return err
		}
	}
	k.close(l)
	return nil
}

// others are the other listeners of a form.
func (k *Keeper) others(l *listener) (others []*listener) {
	for _, o := range k.listeners {
		if o != l && o.Form == l.Form {
			others = append(others, o)
		}
	}
	return others
}

func (k *Keeper) queues() []Queue {
	k.mu.Lock()
	defer k.mu.Unlock()
	queues := []Queue{}
	for _, l := range k.sorted() {
		queues = append(queues, l.queue())
	}
	return queues
}

func (l *listener) queue() Queue {
	waiting, limit, err := sys.Queue(l.sock)
	if err != nil {
		return Queue{ID: l.ID}
	}
	return Queue{ID: l.ID, Waiting: waiting, Limit: limit}
}

// release closes a generation's listeners and forgets the generation once it is gone. A listener on which connections waited
// before the generation took it over stays: the next one inherits it.
func (k *Keeper) release(generation int) []Queue {
	k.mu.Lock()
	defer k.mu.Unlock()
	queues := []Queue{}
	for _, l := range k.sorted() {
		if l.Generation == generation && !(l.Current && l.origin != generation) {
			queues = append(queues, l.queue())
			k.close(l)
		}
	}
	if w := k.workers[generation]; w != nil && w.Gone {
		k.forget(w)
	}
	return queues
}

// close lets go of a listener. If it was the last descriptor, what waits migrates to the current listener of its form.
func (k *Keeper) close(l *listener) {
	if err := k.groups[l.Form].Remove(l.slot); err != nil {
		k.log.Error("a listener did not leave its group", "listener", l.Form, "err", err)
	}
	k.forgetListener(l)
}

// forgetListener closes the keeper's descriptor, and the form's group with its last listener.
func (k *Keeper) forgetListener(l *listener) {
	l.sock.Close()
	delete(k.listeners, l.ID)
	for _, other := range k.listeners {
		if other.Form == l.Form {
			return
		}
	}
	k.groups[l.Form].Close()
	delete(k.groups, l.Form)
	delete(k.strays, l.Form)
}

func (k *Keeper) refuse(generation int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range k.listeners {
		if l.Generation == generation || l.Generation == 0 {
			if err := sys.Unreach(l.sock); err != nil {
				return err
			}
		}
	}
	return nil
}

// relay gives a listener away to a process that forwards what waits on it and then closes it.
func (k *Keeper) relay(r Relay) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.listeners[r.Listener]
	if l == nil {
		return fmt.Errorf("relay: there is no listener %d", r.Listener)
	}
	if !r.To.IsValid() || r.To == (netip.AddrPort{}) {
		return fmt.Errorf("relay: no address to forward to")
	}
	if err := sys.Unreach(l.sock); err != nil {
		return err
	}
	var pid int
	raw, err := l.sock.SyscallConn()
	if err != nil {
		return err
	}
	err2 := raw.Control(func(fd uintptr) {
		pid, err = syscall.ForkExec("/proc/self/exe", []string{relayName, r.To.String()}, &syscall.ProcAttr{
			Env:   slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "LISTEN_") }),
			Files: []uintptr{0, 1, 2, fd},
			Sys:   &syscall.SysProcAttr{Setpgid: true},
		})
	})
	if err == nil {
		err = err2
	}
	if err != nil {
		return fmt.Errorf("start the relay: %w", err)
	}
	k.relays[pid] = struct{}{}
	// It stays a member of its group until the relay ends: to leave would reset what waits where nothing migrates.
	k.forgetListener(l)
	return nil
}
