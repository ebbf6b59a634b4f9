//go:build linux

package keeper

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/berth-net/berth/internal/intercept"
	"github.com/berth-net/berth/internal/steer"
	"github.com/berth-net/berth/internal/sys"
)

// leastBacklog is the smallest accept queue that an adopted listener gets: a queue has to hold the connections that
// wait while nobody accepts. The kernel caps it at net.core.somaxconn.
const leastBacklog = 4096

// bound is a socket that was adopted by bind and does not listen yet.
type bound struct {
	form      Form
	sock      *os.File // kept only where it cannot be duplicated again at listen
	own       bool
	reuse     bool // the program asked for SO_REUSEPORT itself
	reuseAddr bool // and for SO_REUSEADDR
	takes     *listener
}

// option is a setsockopt that a program made on a socket which cannot be read later.
type option struct {
	inode       uint64
	level, name int
	value       []byte
}

// maxOptions bounds what is remembered of a program's setsockopt calls.
const maxOptions = 1024

// adopt answers one call. Whatever is not the business of a TCP listener goes on into the kernel as if nothing was there.
func (k *Keeper) adopt(w *worker, call *intercept.Call) error {
	var errno syscall.Errno
	var handled bool
	switch call.Op {
	case intercept.Bind:
		handled, errno = k.adoptBind(w, call)
	case intercept.Listen:
		handled, errno = k.adoptListen(w, call)
	case intercept.Setsockopt:
		k.noteOption(w, call)
	}
	if !handled {
		return call.Continue()
	}
	return call.Return(errno)
}

func (k *Keeper) adoptBind(w *worker, call *intercept.Call) (handled bool, errno syscall.Errno) {
	if !call.Addr.IsValid() || call.Addr.Port() == 0 {
		return false, 0
	}
	if elsewhere(call.TID) {
		return false, 0 // in a network of its own, where nothing is held
	}
	sock, kind, own, err := k.callSocket(w, call)
	if refusedByRights(err) {
		k.refused(w, call, Form{Addr: call.Addr}, "its sockets can't be looked at, so it is not held: "+err.Error(), false)
	}
	if err != nil || sock == nil {
		return false, 0
	}
	defer sock.Close()
	form := Form{Addr: formAddr(kind, call), V6Only: kind.Family == sys.INET6 && kind.V6Only, Device: kind.Device}
	if !k.mayUse(form, call.TID) {
		return false, 0
	}
	if addr, err := sys.LocalAddr(sock); own && (err != nil || addr.Port() != 0) {
		// Bound already, which the kernel answers with EINVAL; but a signal can make a program repeat the very call that was answered
		// with 0 (seccomp_unotify(2), "Interaction with SA_RESTART").
		b, ok := w.bound[kind.Inode]
		return ok && b.form == form, 0
	}
	if inode, err := call.Inode(); !own && err == nil {
		// The same for a socket that cannot be looked at: it is bound if it was put there for the program.
		if b, ok := w.bound[inode]; ok {
			return b.form == form, 0
		}
		for _, l := range k.listeners {
			if l.Inode == inode {
				return false, 0
			}
		}
	}

	b := bound{form: form, own: own, reuse: kind.Reuse, reuseAddr: kind.ReuseAddr}
	for inode, other := range w.bound {
		// The kernel's rule for two sockets of which none listens.
		if other.form.Overlaps(form) && !(other.reuse && b.reuse) && !(other.reuseAddr && b.reuseAddr) && holds(inode) {
			return true, syscall.EADDRINUSE
		}
	}
	var stranger *listener // another generation's, from which connections would change over
	for _, l := range k.listeners {
		if !l.Form.Overlaps(form) || l.Generation == 0 || k.isGone(l.Generation) {
			continue
		}
		switch {
		case l.Generation == w.Generation && kind.Reuse && l.reuse:
			// The program shares the port with itself, as it meant to.
		case l.Generation == w.Generation && holds(l.Inode):
			// Said before all else, as without berth: a program may well try this and go on.
			return true, syscall.EADDRINUSE
		case l.Generation != w.Generation && l.Form != form && l.Current && k.groups[form] == nil:
			stranger = l
		}
	}
	if stranger != nil {
		k.refused(w, call, form, fmt.Sprintf(
			"it binds %s, but generation %d serves %s: connections would change over before it is ready; stop the service to change the form of its address",
			form, stranger.Generation, stranger.Form), true)
		return true, syscall.EADDRINUSE
	}
	target := sock
	if !own || kind.Protocol == sys.ProtoMPTCP {
		target, err = k.replacement(w, call, kind, sock, own)
		if err != nil {
			k.refused(w, call, form, err.Error(), true)
			return true, sys.Errno(err)
		}
		defer target.Close()
		b.own = false
	}
	if l := k.inheritable(w, form); l != nil && k.mode == steer.Classic {
		// Nothing migrates with classic BPF, so the program is given the very socket on which connections wait.
		if own {
			_ = sys.CarryOptions(l.sock, sock)
		}
		if err := call.Replace(l.sock); err != nil {
			k.refused(w, call, form, err.Error(), true)
			return true, sys.Errno(err)
		}
		l.Generation, l.PID, l.Own = w.Generation, call.TID, false
		w.bound[l.Inode] = bound{form: form, takes: l, reuse: kind.Reuse}
		return true, 0
	}
	if err := k.bind(target, form); err != nil {
		errno := sys.Errno(err)
		if errno == syscall.EADDRINUSE {
			k.refused(w, call, form, InUse, false)
		}
		return true, errno
	}
	kind, err = sys.KindOf(target)
	if err != nil {
		return true, sys.Errno(err)
	}
	if target != sock {
		if err := call.Replace(target); err != nil {
			k.refused(w, call, form, err.Error(), true)
			return true, sys.Errno(err)
		}
		if !own {
			if b.sock, err = sys.Duplicate(target); err != nil {
				return true, sys.Errno(err)
			}
		}
	}
	w.bound[kind.Inode] = b
	return true, 0
}

// callSocket is a duplicate of the caller's socket with its kind, if it is a TCP one; own is false where it cannot be duplicated, and
// then the socket is an unbound one, and the kind what can be known from outside.
func (k *Keeper) callSocket(w *worker, call *intercept.Call) (sock *os.File, kind sys.Kind, own bool, err error) {
	if k.means.Adoption == AdoptDuplicate {
		sock, err = call.Socket()
		if err == nil {
			kind, err = sys.KindOf(sock)
			if err != nil || !kind.IsStream() {
				sock.Close()
				return nil, kind, false, err
			}
			return sock, kind, true, nil
		}
		if !refusedByRights(err) {
			return nil, kind, false, err
		}
	}
	proto, err := call.Protocol()
	if err != nil {
		return nil, kind, false, err
	}
	kind.Protocol = sys.ProtoTCP
	switch proto {
	case "TCP":
		kind.Family = sys.INET
	case "TCPv6":
		kind.Family = sys.INET6
	case "MPTCP", "MPTCPv6":
		kind.Family, kind.Protocol = sys.INET, sys.ProtoMPTCP
		if proto == "MPTCPv6" || call.Addr.Addr().Is6() {
			kind.Family = sys.INET6
		}
	default:
		return nil, kind, false, nil
	}
	if sock, err = k.makeSocket(w, kind.Family); err != nil {
		return nil, kind, false, err
	}
	inode, err := call.Inode()
	if err != nil {
		sock.Close()
		return nil, kind, false, err
	}
	for _, o := range w.options {
		if o.inode == inode {
			_ = sys.SetOption(sock, o.level, o.name, o.value)
			on := len(o.value) > 0 && o.value[0] != 0
			kind.Reuse = kind.Reuse || sys.IsReusePort(o.level, o.name) && on
			kind.ReuseAddr = kind.ReuseAddr || sys.IsReuseAddr(o.level, o.name) && on
		}
	}
	made, err := sys.KindOf(sock)
	if err != nil {
		sock.Close()
		return nil, kind, false, err
	}
	kind.V6Only, kind.Device = made.V6Only, made.Device
	return sock, kind, false, nil
}

func refusedByRights(err error) bool {
	return errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.ENOSYS)
}

// replacement is the plain TCP socket that goes over the program's descriptor.
func (k *Keeper) replacement(w *worker, call *intercept.Call, kind sys.Kind, sock *os.File, own bool) (*os.File, error) {
	if !own {
		return sys.Duplicate(sock) // made for this call, with the options on it
	}
	fresh, err := k.makeSocket(w, kind.Family)
	if err != nil {
		return nil, err
	}
	if err := sys.CarryOptions(fresh, sock); err != nil {
		fresh.Close()
		return nil, err
	}
	return fresh, nil
}

// makeSocket takes one that was made inside the generation's cgroup, or makes one here, whose connections its BPF does not see.
func (k *Keeper) makeSocket(w *worker, family int) (*os.File, error) {
	if w != nil && len(w.spare[family]) > 0 {
		s := w.spare[family]
		w.spare[family] = s[1:]
		return s[0], nil
	}
	return sys.StreamSocket(family)
}

// bind claims the form for the group. The first listener of a form binds without SO_REUSEPORT, so that the kernel itself refuses it
// where another program, even one that would share, has the port.
func (k *Keeper) bind(sock *os.File, form Form) error {
	uid := uint32(os.Geteuid())
	if kind, err := sys.KindOf(sock); err == nil && kind.UID != uid {
		if err := sys.Chown(sock, uid); err != nil {
			return err
		}
	}
	if err := sys.SetReuseAddr(sock, true); err != nil {
		return err
	}
	first, ours := true, false
	for _, l := range k.listeners {
		first = first && l.Form != form
		ours = ours || l.Form.Overlaps(form)
	}
	if first {
		if err := sys.SetReusePort(sock, false); err != nil {
			return err
		}
		err := sys.Bind(sock, form.Family(), form.Addr)
		if err == nil {
			return sys.SetReusePort(sock, true)
		}
		if !ours || err != syscall.EADDRINUSE {
			return err
		}
	}
	if err := sys.SetReusePort(sock, true); err != nil {
		return err
	}
	return sys.Bind(sock, form.Family(), form.Addr)
}

func (k *Keeper) adoptListen(w *worker, call *intercept.Call) (handled bool, errno syscall.Errno) {
	inode, err := call.Inode()
	if err != nil {
		return false, 0
	}
	for _, l := range k.listeners {
		if l.Inode == inode && l.Generation == w.Generation {
			if b, ok := w.bound[inode]; ok && b.takes == l {
				delete(w.bound, inode)
				l.reuse, l.Backlog = b.reuse, call.Backlog
				k.emit(Event{Listening: &l.Listener})
			}
			// A second listen changes the backlog.
			return true, sys.Errno(sys.ListenOn(l.sock, max(call.Backlog, leastBacklog)))
		}
	}
	b, ok := w.bound[inode]
	if !ok {
		return false, 0
	}
	for _, l := range k.listeners {
		// listen(2) checks again, and SO_REUSEADDR does not help beside one that listens.
		if l.Generation == w.Generation && l.Form.Overlaps(b.form) && !(l.reuse && b.reuse) && holds(l.Inode) {
			return true, syscall.EADDRINUSE
		}
	}
	sock := b.sock
	if sock == nil {
		if sock, err = call.Socket(); err != nil {
			return false, 0
		}
	}
	delete(w.bound, inode)
	if err := sys.ListenOn(sock, max(call.Backlog, leastBacklog)); err != nil {
		sock.Close()
		return true, sys.Errno(err)
	}
	l := &listener{
		Listener: Listener{Form: b.form, Generation: w.Generation, PID: call.TID, Backlog: call.Backlog, Own: b.own, Inode: inode},
		sock:     sock, reuse: b.reuse, origin: w.Generation,
	}
	if err := k.join(l); err != nil {
		k.refused(w, call, b.form, err.Error(), true)
		return true, sys.Errno(err)
	}
	k.emit(Event{Listening: &l.Listener})
	return true, 0
}

// noteOption remembers an option for the socket that will be put in the place of this one.
func (k *Keeper) noteOption(w *worker, call *intercept.Call) {
	inode, err := call.Inode()
	if err != nil || len(call.Value) == 0 || !sys.Carried(call.Level, call.Name) && !sys.IsReusePort(call.Level, call.Name) && !sys.IsReuseAddr(call.Level, call.Name) {
		return
	}
	if len(w.options) == maxOptions {
		w.options = append(w.options[:0], w.options[1:]...)
	}
	w.options = append(w.options, option{inode, call.Level, call.Name, call.Value})
}

// InUse is the reason of a bind that the kernel refused with EADDRINUSE.
const InUse = "another program has the address"

func (k *Keeper) refused(w *worker, call *intercept.Call, form Form, reason string, fatal bool) {
	k.emit(Event{Refused: &Refused{Generation: w.Generation, PID: call.TID, Form: form, Reason: reason, Fatal: fatal}})
}

func (k *Keeper) isGone(generation int) bool {
	w := k.workers[generation]
	return w == nil || w.Gone || w.Exited && (w.Status.Signaled() || w.Status.ExitStatus() != 0)
}

// inheritable is the listener of the form on which connections wait that nobody accepts.
func (k *Keeper) inheritable(w *worker, form Form) *listener {
	for _, l := range k.listeners {
		if l.Form != form || !l.Current {
			continue
		}
		// Its first process may be dead and others still accept.
		owner := k.workers[l.Generation]
		if owner == nil || owner.Gone || (k.isGone(l.Generation) || l.Generation == w.Generation) && !holds(l.Inode) {
			return l
		}
	}
	return nil
}

// mayUse keeps the keeper's own rights from its programs: a port below the unprivileged ones is bound for a program that has
// not the right itself only if the service names it.
func (k *Keeper) mayUse(form Form, tid int) bool {
	if int(form.Addr.Port()) >= unprivilegedPort() || os.Geteuid() != 0 {
		return true
	}
	for _, d := range k.config.Declared {
		if d.Addr.Port() == form.Addr.Port() {
			return true
		}
	}
	const netBindService = 1 << 10
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && caps&netBindService != 0
		}
	}
	return false
}

func unprivilegedPort() int {
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	n, err2 := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || err2 != nil {
		return 1024
	}
	return n
}

// holds reports whether a process other than berth's still has the socket. It is asked only when a program binds an address twice.
func holds(inode uint64) bool {
	want := fmt.Sprintf("socket:[%d]", inode)
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return true
	}
	own := fmt.Sprintf("/proc/%d/", os.Getpid())
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && target == want && !strings.HasPrefix(fd, own) {
			return true
		}
	}
	return false
}

// formAddr is the address as the socket's family sees it, with the zone of a link-local one.
func formAddr(kind sys.Kind, call *intercept.Call) netip.AddrPort {
	addr := call.Addr.Addr()
	switch {
	case kind.Family == sys.INET:
		addr = addr.Unmap()
	case addr.IsLinkLocalUnicast() && addr.Is6() && call.ScopeID != 0:
		addr = addr.WithZone(strconv.FormatUint(uint64(call.ScopeID), 10))
	}
	return netip.AddrPortFrom(addr, call.Addr.Port())
}

// elsewhere reports whether a thread is in another network namespace than the keeper.
func elsewhere(tid int) bool {
	own, err1 := os.Readlink("/proc/self/ns/net")
	its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", tid))
	return err1 == nil && err2 == nil && own != its
}
