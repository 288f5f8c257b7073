// Command servers holds the servers of a Kubernetes cluster; its first argument says which one to be. Each is the program of
// the same name from k8s.io/kubernetes; one binary links their shared code once.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	if len(os.Args) < 2 {
		fail("say which server to be: etcd, apiserver, controllers, scheduler, proxy or kubelet")
	}
	role := os.Args[1]
	// The commands parse os.Args themselves.
	os.Args = append([]string{role}, os.Args[2:]...)
	var command *cobra.Command
	switch role {
	case "apiserver":
		command = apiserver.NewAPIServerCommand()
	case "controllers":
		command = controllers.NewControllerManagerCommand()
	case "scheduler":
		command = scheduler.NewSchedulerCommand()
	case "proxy":
		command = proxy.NewProxyCommand()
	case "kubelet":
		command = kubelet.NewKubeletCommand(context.Background())
	case "etcd":
		if len(os.Args) != 2 {
			fail("etcd takes one argument, its data folder")
		}
		if err := serveEtcd(os.Args[1]); err != nil {
			fail(err)
		}
		return
	default:
		fail("no server is called", role)
	}
	os.Exit(cli.Run(command))
}

func fail(words ...any) {
	fmt.Fprintln(os.Stderr, append([]any{"servers:"}, words...)...)
	os.Exit(1)
}

// serveEtcd serves on its default loopback address until SIGTERM. What a test cluster stores need not survive the machine,
// so nothing waits for the disk.
func serveEtcd(folder string) error {
	config := embed.NewConfig()
	config.Dir = folder
	config.LogLevel = "warn"
	config.UnsafeNoFsync = true
	server, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	select {
	case <-ended:
		server.Close()
		return nil
	case err := <-server.Err():
		return err
	}
}
