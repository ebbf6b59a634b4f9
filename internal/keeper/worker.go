//go:build linux

package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/berth-net/berth/internal/intercept"
	"github.com/berth-net/berth/internal/sys"
)

// worker is a generation's process with all that the keeper holds for it.
type worker struct {
	Worker
	notify   *intercept.Listener // nil: its calls are not intercepted
	outputs  []*os.File          // reading ends of its standard output and error
	bound    map[uint64]bound    // adopted by bind, not listening yet, by inode
	spare    map[int][]*os.File  // unused sockets made inside its cgroup, by family
	noCgroup string              // why it is not in its cgroup
	options  []option            // what it set on sockets, where they cannot be read later
}

// shimSpec is what the keeper tells the shim. The environment and the command travel as the shim's own.
type shimSpec struct {
	Dir        string   `json:"dir,omitempty"`
	Names      []string `json:"names,omitempty"` // LISTEN_FDNAMES of the descriptors that come before it executes
	Spare      []int    `json:"spare"`           // families of the sockets that it makes first
	Intercept  bool     `json:"intercept"`
	Setsockopt bool     `json:"setsockopt"`
}

// shimReport is what the shim answers: first with the notification descriptor and its spare sockets, and again only if it could not execute.
type shimReport struct {
	Step   string        `json:"step,omitempty"` // what failed
	Errno  syscall.Errno `json:"errno,omitempty"`
	Text   string        `json:"text,omitempty"`
	Spare  []int         `json:"spare,omitempty"`  // families of the spare sockets
	Notify bool          `json:"notify,omitempty"` // the first file is the notification descriptor
}

func (k *Keeper) start(s Start) (Begun, []*os.File, error) {
	k.mu.Lock()
	if _, ok := k.workers[s.Generation]; ok || s.Generation <= 0 {
		k.mu.Unlock()
		return Begun{}, nil, fmt.Errorf("generation %d is there already", s.Generation)
	}
	w := &worker{Worker: Worker{Generation: s.Generation}, bound: map[uint64]bound{}, spare: map[int][]*os.File{}}
	k.workers[s.Generation] = w
	k.mu.Unlock()
	if err := k.startShim(w, s); err != nil {
		k.mu.Lock()
		k.forget(w)
		k.mu.Unlock()
		return Begun{}, nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var outputs []*os.File
	for _, out := range w.outputs {
		// Duplicates: the generation may be forgotten before the answer is sent.
		dup, err := sys.Duplicate(out)
		if err != nil {
			closeAll(outputs)
			return Begun{}, nil, err
		}
		outputs = append(outputs, dup)
	}
	return Begun{w.Worker, k.means, w.noCgroup}, outputs, nil
}

// hand makes the generation's fresh listeners.
func (k *Keeper) hand(w *worker, hands []Hand) (files []*os.File, err error) {
	for _, h := range hands {
		l, err := k.freshListener(w, h.Form)
		if err != nil {
			return nil, err
		}
		l.Handed = true
		files = append(files, l.sock)
		k.emit(Event{Listening: &l.Listener})
	}
	return files, nil
}

// spares is how many sockets of each family a shim makes for its program besides those that are handed over: one for each
// listener that has to be replaced. They are made there, for a socket belongs to the cgroup of the process that makes it,
// and a connection to that of its listener.
const spares = 2

func (k *Keeper) shimSpec(s Start) shimSpec {
	spec := shimSpec{Dir: s.Dir, Intercept: true, Setsockopt: k.means.Adoption == AdoptReplace}
	for range spares {
		spec.Spare = append(spec.Spare, sys.INET, sys.INET6)
	}
	for _, h := range s.Hand {
		name := h.Name
		if name == "" {
			name = "unknown" // as sd_listen_fds_with_names(3) calls one without a name
		}
		spec.Names, spec.Spare = append(spec.Names, name), append(spec.Spare, h.Form.Family())
	}
	return spec
}

func (k *Keeper) startShim(w *worker, s Start) error {
	ours, theirs, err := sys.SeqpacketPair()
	if err != nil {
		return err
	}
	defer ours.Close()
	defer theirs.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	stdout, stderr, err := w.openOutputs()
	if err != nil {
		return err
	}
	defer stdout.Close()
	if stderr != stdout {
		defer stderr.Close()
	}
	attr := &syscall.ProcAttr{
		Env:   k.environment(s),
		Files: []uintptr{null.Fd(), stdout.Fd(), stderr.Fd(), theirs.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	if s.Cgroup != "" {
		dir, err := os.Open(s.Cgroup)
		if err != nil {
			return fmt.Errorf("start in the cgroup: %w", err)
		}
		defer dir.Close()
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(dir.Fd())
	}
	args := append([]string{shimName, s.Path}, s.Args...)
	pid, err := syscall.ForkExec("/proc/self/exe", args, attr)
	if err != nil && attr.Sys.UseCgroupFD {
		// clone3 or its flag is refused in many a container.
		w.noCgroup = err.Error()
		attr.Sys.UseCgroupFD = false
		pid, err = syscall.ForkExec("/proc/self/exe", args, attr)
	}
	if err != nil {
		return fmt.Errorf("start a process: %w", err)
	}
	k.mu.Lock()
	w.PID = pid
	k.mu.Unlock()
	theirs.Close()
	spec, err := json.Marshal(k.shimSpec(s))
	if err != nil {
		return err
	}
	if err := sys.SendMessage(ours, spec); err != nil {
		return err
	}
	report, files, err := receiveReport(ours)
	if err != nil {
		return err
	}
	if report.Step != "" {
		closeAll(files)
		return report.err(s)
	}
	k.mu.Lock()
	if report.Notify && len(files) > 0 {
		w.notify = intercept.NewListener(files[0])
		files = files[1:]
	} else {
		k.means.Intercept, k.means.InterceptWhy = false, report.Text
	}
	for i, family := range report.Spare {
		if i < len(files) {
			w.spare[family] = append(w.spare[family], files[i])
		}
	}
	handed, err := k.hand(w, s.Hand)
	notify := w.notify
	k.mu.Unlock()
	if err != nil {
		return err
	}
	if notify != nil {
		go k.answerCalls(w, notify)
	}
	if err := sys.SendMessage(ours, []byte("go"), handed...); err != nil {
		return err
	}
	// The socket closes when the command is executed.
	report, files, err = receiveReport(ours)
	closeAll(files)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	return report.err(s)
}

func receiveReport(sock *os.File) (shimReport, []*os.File, error) {
	buf := make([]byte, 4096)
	n, files, err := sys.ReceiveMessage(sock, buf)
	if err != nil {
		return shimReport{}, nil, err
	}
	var r shimReport
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		closeAll(files)
		return shimReport{}, nil, err
	}
	return r, files, nil
}

func (r shimReport) err(s Start) error {
	switch r.Step {
	case stepExec:
		return fmt.Errorf("execute %s: %w", s.Path, r.Errno)
	case stepFilter:
		return fmt.Errorf("berth can't %s: %s; a program that takes its listeners as LISTEN_FDS works all the same, with --fds", r.Step, r.Text)
	case stepDir:
		return fmt.Errorf("change to the folder %s: %w", s.Dir, r.Errno)
	}
	return fmt.Errorf("%s: %s", r.Step, r.Text)
}

// environment is the keeper's, without what a service manager meant for the keeper alone.
func (k *Keeper) environment(s Start) []string {
	added := append(slices.Clone(s.Env), "BERTH_SERVICE="+k.config.Name, "BERTH_GENERATION="+strconv.Itoa(s.Generation), "BERTH_KEEPER="+strconv.Itoa(os.Getpid()))
	dropped := map[string]bool{"NOTIFY_SOCKET": true, "LISTEN_PID": true, "LISTEN_FDS": true, "LISTEN_FDNAMES": true,
		"LISTEN_PIDFDID": true, "WATCHDOG_PID": true, "WATCHDOG_USEC": true, "JOURNAL_STREAM": true}
	var env []string
	// The last one of a name counts.
	for _, kv := range slices.Backward(slices.Concat(slices.DeleteFunc(os.Environ(), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return dropped[name]
	}), added)) {
		name, _, _ := strings.Cut(kv, "=")
		if !slices.ContainsFunc(env, func(have string) bool { return strings.HasPrefix(have, name+"=") }) {
			env = append(env, kv)
		}
	}
	slices.Reverse(env)
	return env
}

// openOutputs makes the program's standard output and error: terminals if ours are, one file if ours are one.
func (w *worker) openOutputs() (stdout, stderr *os.File, err error) {
	open := func(like *os.File) (*os.File, error) {
		make := sys.OutputPipe
		if sys.IsTerminal(like) {
			make = func() (*os.File, *os.File, error) { return sys.OutputTerminal(like) }
		}
		read, program, err := make()
		if err != nil {
			return nil, err
		}
		w.outputs = append(w.outputs, read)
		w.Outputs++
		return program, nil
	}
	if stdout, err = open(os.Stdout); err != nil {
		return nil, nil, err
	}
	if sys.SameFile(os.Stdout, os.Stderr) {
		return stdout, stdout, nil
	}
	if stderr, err = open(os.Stderr); err != nil {
		stdout.Close()
		return nil, nil, err
	}
	return stdout, stderr, nil
}

// answerCalls answers a generation's notifications until no process of it is left.
func (k *Keeper) answerCalls(w *worker, notify *intercept.Listener) {
	for {
		call, err := notify.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				k.log.Error("notifications of a generation can't be read any more", "generation", w.Generation, "err", err)
			}
			break
		}
		k.mu.Lock()
		err = k.adopt(w, call)
		k.mu.Unlock()
		if err != nil {
			k.log.Debug("a caller went away while it was answered", "generation", w.Generation, "err", err)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	notify.Close()
	if k.workers[w.Generation] == w {
		w.Gone = true
		k.emit(Event{Gone: w.Generation})
	}
}

// forget lets go of what is held for a generation, but for its listeners.
func (k *Keeper) forget(w *worker) {
	delete(k.workers, w.Generation)
	if w.notify != nil {
		w.notify.Close()
	}
	closeAll(w.outputs)
	for _, spares := range w.spare {
		closeAll(spares)
	}
	for _, b := range w.bound {
		if b.sock != nil {
			b.sock.Close()
		}
	}
}
